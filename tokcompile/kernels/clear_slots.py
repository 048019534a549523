"""tokred::clear_slots: say in a cache which of its slots hold no token."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from ._empty import EMPTY


def reference(x: Tensor, filled: Tensor) -> Tensor:
    """Write what `held_slots` knows an empty slot by. It is finite, so that attention which hides a slot can read it.

    Args:
        x: float [B, H, T, D], keys or values of a cache.
        filled: bool [B, T].

    Returns:
        x with one value in all entries of the other slots.

    Raises:
        ValueError: x is not [B, H, T, D], or filled not [B, T].
    """
    if x.dim() != 4 or filled.dim() != 2:
        raise ValueError(f"x must be [B, H, T, D] and filled [B, T], not {list(x.shape)} and {list(filled.shape)}")
    return torch.where(filled[:, None, :, None], x, torch.full((), EMPTY, dtype=x.dtype, device=x.device))


clear_slots = _library.define("clear_slots(Tensor x, Tensor filled) -> Tensor", reference)
