"""tokred::random_scores: pseudo-random scores that are the same on every target."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _hash, _library


def reference(like: Tensor, seed: int) -> Tensor:
    """A hash of (seed, token index): no generator state, no dependence on batch size, row, dtype or device.

    Args:
        like: [B, N], any dtype; only its shape and device matter.
        seed: any int64.

    Returns:
        float32 [B, N] in [0, 1), multiples of 2^-24, equal in all rows.

    Raises:
        ValueError: not two-dimensional.
    """
    if like.dim() != 2:
        raise ValueError(f"like must be [B, N], not {list(like.shape)}")
    word = _hash.hashed(torch.arange(like.shape[1], device=like.device), seed)
    return ((word >> 8).to(torch.float32) * 2.0**-24).expand(like.shape).contiguous()


random_scores = _library.define("random_scores(Tensor like, int seed) -> Tensor", reference)
