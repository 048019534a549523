"""tokred::mark_slots: a sequence in which each run of tokens becomes one, as a fixed number of slots."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library


def reference(runs: Tensor, length: int) -> Tensor:
    """List what stands in each slot of the new sequence, which ends at the last slot.

    A run of neighbouring True becomes one new token at the place of its last one ("FocusUI", section 3: PosPad).

    Args:
        runs: bool [B, T], the tokens that are replaced.
        length: slots, static or symbolic. A row with more tokens than slots loses its first ones; the caller checks.

    Returns:
        int64 [B, length]: the old token in a slot; -2 - i for a new token at the place of the old token i; -1 for an
        empty slot. Empty ones come first, the others in ascending order of their places.

    Raises:
        ValueError: runs is not bool [B, T].
    """
    if runs.dim() != 2 or runs.dtype != torch.bool:
        raise ValueError(f"runs must be bool [B, T], not {runs.dtype} {list(runs.shape)}")
    batch, tokens = runs.shape
    ends = runs & ~F.pad(runs[:, 1:], (0, 1))
    stays = ~runs | ends
    index = torch.arange(tokens, device=runs.device).expand(batch, tokens)
    held = torch.where(ends, -2 - index, index)
    count = stays.cumsum(1)
    slot = count - 1 + (length - count[:, -1:])
    # What has no slot shares one past the end, so that shapes never depend on data. With room for every token, because
    # TensorRT scatters into tensors no smaller than the indices.
    slot = torch.where(stays & (slot >= 0), slot, length)
    empty = held.new_full((batch, 1), -1).expand(batch, length + tokens)
    return empty.scatter(1, slot, held)[:, :length].contiguous()


mark_slots = _library.define("mark_slots(Tensor runs, SymInt length) -> Tensor", reference, triton="triton_mark_slots")
