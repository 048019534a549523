"""tokred::random_scores: pseudo-random scores that are the same on every target."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from . import _library

_WORD = 0xFFFFFFFF
_Word = TypeVar("_Word", int, Tensor)


def _mix(word: _Word) -> _Word:
    """Bijective 32-bit finaliser on ints or int64 tensors in [0, 2^32).

    Both multipliers are below 2^31, so no product leaves int64: the same bits in Python, ATen and C++.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


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
    salt = _mix((_mix(seed & _WORD) + ((seed >> 32) & _WORD)) & _WORD)
    index = torch.arange(like.shape[1], device=like.device)
    # The salt goes in between two rounds: added to the index, seeds would give shifted copies of one sequence.
    word = _mix(_mix(index + 1) ^ salt)
    return ((word >> 8).to(torch.float32) * 2.0**-24).expand(like.shape).contiguous()


random_scores = _library.define("random_scores(Tensor like, int seed) -> Tensor", reference)
