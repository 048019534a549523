"""tokred::slot_source: the token map of a sequence of slots."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(slots: Tensor, like: Tensor) -> Tensor:
    """Name the old token at whose place each slot stands.

    Args:
        slots: int64 [B, T'], as `mark_slots` lists them.
        like: [B, T], any value of the old sequence; only its second dimension counts.

    Returns:
        int64 [B, T'], within [0, T); 0 for an empty slot, whose values nobody may read.

    Raises:
        ValueError: slots or like is not two-dimensional.
    """
    if slots.dim() != 2 or like.dim() != 2:
        raise ValueError(f"slots must be [B, T'] and like [B, T], not {list(slots.shape)} and {list(like.shape)}")
    return torch.where(slots < -1, -2 - slots, slots.clamp(min=0))


slot_source = _library.define("slot_source(Tensor slots, Tensor like) -> Tensor", reference)
