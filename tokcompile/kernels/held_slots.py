"""tokred::held_slots: which slots of a cache hold a token."""

from __future__ import annotations

from torch import Tensor

from . import _library
from ._empty import EMPTY


def reference(x: Tensor) -> Tensor:
    """Tell the slots that `clear_slots` wrote to from all others.

    Args:
        x: float [B, H, T, D], keys or values of a cache. The first head tells, so that a step reads little.

    Returns:
        bool [B, T], False for an empty slot.

    Raises:
        ValueError: x is not [B, H, T, D].
    """
    if x.dim() != 4:
        raise ValueError(f"x must be [B, H, T, D], not {list(x.shape)}")
    return (x[:, 0] != EMPTY).any(-1)


held_slots = _library.define("held_slots(Tensor x) -> Tensor", reference)
