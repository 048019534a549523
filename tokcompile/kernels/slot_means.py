"""tokred::slot_means: the mean of the tokens that each slot of a marked sequence stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .slot_source import reference as source_of


def reference(x: Tensor, slots: Tensor) -> Tensor:
    """Average the tokens from the one after a slot's predecessor up to its own place.

    Args:
        x: float [B, T, C].
        slots: int64 [B, T'], as `mark_slots` lists them.

    Returns:
        [B, T', C] in x's dtype, of sums in float32; an empty slot is 0.

    Raises:
        ValueError: x is not [B, T, C].
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], not {list(x.shape)}")
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    filled = slots != -1
    last = source_of(slots, slots)
    before = torch.cat([last[:, :1], last[:, :-1]], 1)
    first = torch.where(filled & torch.cat([filled[:, :1] & False, filled[:, :-1]], 1), before + 1, 0)
    index = torch.arange(x.shape[1], device=x.device)
    inside = (index >= first[:, :, None]) & (index <= last[:, :, None]) & filled[:, :, None]
    # A product with zeros and ones adds in a fixed order on every device, which a scatter does not.
    share = inside.to(wide.dtype)
    return (share @ wide / share.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype)


slot_means = _library.define("slot_means(Tensor x, Tensor slots) -> Tensor", reference)
