"""tokred::unturn_keys: keys of a cache without their rotary positions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _turning


def reference(keys: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """Undo the rotation of keys by their tables.

    Args:
        keys: float [B, H, T, D], turned.
        cos, sin: float [B or 1, H or 1, T, W]: a column for each of the first W numbers of a head, which are turned.
        neighbours: whether the numbers of a pair stand side by side, and not W / 2 from each other.

    Returns:
        float32 [B, H, T, D].

    Raises:
        ValueError: shapes that do not fit.
    """
    _turning.check(keys, cos, sin)
    return _turning.unturn(keys.to(torch.float32), cos.to(torch.float32), sin.to(torch.float32), neighbours)


unturn_keys = _library.define(
    "unturn_keys(Tensor keys, Tensor cos, Tensor sin, bool neighbours) -> Tensor",
    reference,
    triton="triton_unturn_keys",
)
