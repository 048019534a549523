"""tokred::mark_tokens: the tokens of a marked sequence: old ones, new ones in place of runs, and empty slots."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .slot_source import reference as source_of


def reference(x: Tensor, slots: Tensor, content: Tensor | None) -> Tensor:
    """Fill the slots of a sequence.

    Args:
        x: [B, T, C].
        slots: int64 [B, T'], as `mark_slots` lists them.
        content: what new tokens are: [C], [B, C], or [B, T', C] with one for each slot; None for zeros.

    Returns:
        [B, T', C] in x's dtype, contiguous. Old tokens are bit for bit what they were; empty slots are 0.

    Raises:
        ValueError: x is not [B, T, C].
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], not {list(x.shape)}")
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    old = x[row, source_of(slots, slots)]
    nothing = torch.zeros((), dtype=x.dtype, device=x.device)
    if content is None:
        return torch.where((slots >= 0)[:, :, None], old, nothing)
    new = content.to(x.dtype)
    new = new[:, None] if new.dim() == 2 else new
    made = torch.where((slots < -1)[:, :, None], new, nothing)
    return torch.where((slots >= 0)[:, :, None], old, made)


mark_tokens = _library.define(
    "mark_tokens(Tensor x, Tensor slots, Tensor? content) -> Tensor", reference, triton="triton_mark_tokens"
)
