"""Pseudo-random numbers without a generator: a hash that is the same in Python, ATen and C++."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

WORD = 0xFFFFFFFF
Word = TypeVar("Word", int, Tensor)


def mix(word: Word) -> Word:
    """Bijective 32-bit finaliser on ints or int64 tensors in [0, 2^32).

    Both multipliers are below 2^31, so no product leaves int64: the same bits in Python, ATen and C++.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & WORD
    return word ^ (word >> 15)


def salt(seed: int) -> int:
    """Spread a seed (any int64) over 32 bits."""
    return mix((mix(seed & WORD) + ((seed >> 32) & WORD)) & WORD)


def hashed(index: Word, seed: int) -> Word:
    """Hash indices under a seed to [0, 2^32).

    The salt goes in between two rounds: added to the index, seeds would give shifted copies of one sequence.
    """
    return mix(mix(index + 1) ^ salt(seed))
