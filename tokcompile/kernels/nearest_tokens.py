"""tokred::nearest_tokens: which of a few tokens each token is most like."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _vectors


def reference(keys: Tensor, source: Tensor, among: Tensor | None) -> Tensor:
    """Assign every token of a group to the source token of largest cosine similarity; a source token to itself.

    Args:
        keys: float [B, T, C], compared in float32 whatever their dtype. A zero vector has similarity 0 to all.
        source: int64 [B, S], S of the T tokens.
        among: bool [B, T], the tokens to assign; None: all.

    Returns:
        int64 [B, T] in [0, S): the slot in `source`; -1 outside the group. Ties go to the lowest slot; NaN is less
        than any similarity.

    Raises:
        ValueError: wrong ranks or mask dtype.
    """
    if keys.dim() != 3 or source.dim() != 2:
        raise ValueError(f"keys must be [B, T, C] and source [B, S], not {list(keys.shape)} and {list(source.shape)}")
    if among is not None and (among.dim() != 2 or among.dtype != torch.bool):
        raise ValueError(f"among must be bool [B, T], not {among.dtype} {list(among.shape)}")
    unit = _vectors.unit(keys.to(torch.float32))
    of_slot = unit.gather(1, source.unsqueeze(2).expand(-1, -1, unit.shape[2]))
    likeness = _vectors.likeness(unit, of_slot)
    likeness = torch.where(likeness != likeness, -torch.inf, likeness)
    itself = source.unsqueeze(1) == torch.arange(keys.shape[1], device=keys.device)[:, None]
    slot = torch.where(itself, torch.inf, likeness).argmax(2)
    return slot if among is None else torch.where(among, slot, -1)


nearest_tokens = _library.define("nearest_tokens(Tensor keys, Tensor source, Tensor? among) -> Tensor", reference)
