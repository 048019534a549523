"""A second opinion on rotary bases: how far tokens that are alike get more attention than others.

Source: Men et al., "Base of RoPE Bounds Context Length" (2024), arXiv 2405.14591. A query and a key of one content, m
positions apart, score in the mean above those of random content by a multiple of B(m) = sum_i cos(m theta_i). A context
of L tokens asks for B(m) >= 0 for all m up to L. Sums are computed in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokcompile.errors import TokredError
from tokcompile.rope.ropebounds import aliasing, ladder

PAPER = "arXiv 2405.14591"
_BLOCK = 1 << 14
_SAMPLES = 1000
_STEP = 1.01
"""Ratio of neighbouring bases of the scan."""
_LARGEST = 1e12


def reach(frequencies: Sequence[float], limit: int) -> int:
    """The largest L up to `limit` such that B(m) >= 0 for all whole m from 0 to L.

    Args:
        frequencies: in radians a token, of the pairs of one head.
        limit: positions after which the search ends.
    """
    turns = torch.tensor(list(frequencies), dtype=torch.float64)
    for start in range(0, limit + 1, _BLOCK):
        places = torch.arange(start, min(start + _BLOCK, limit + 1), dtype=torch.float64)
        below = (torch.outer(places, turns).cos().sum(1) < 0).nonzero()
        if len(below):
            return start + int(below[0]) - 1
    return limit


def least_base(length: int, d: int) -> float:
    """The least base of a scan (ratio 1.01 between its bases) that reaches L, to three digits; larger ones need not.

    The scan begins where the slowest frequency comes round within L: below that all of them do.

    Args:
        length: L, the largest position.
        d: rotary dimension; its frequencies are base^(-2 i / d).

    Raises:
        TokredError: L is below 1, or no base up to 1e12 reaches it.
    """
    base, samples = aliasing(length, d), _samples(length)
    while base < _LARGEST:
        turns = ladder(base, d)
        hopeful = (torch.outer(samples, torch.tensor(turns, dtype=torch.float64)).cos().sum(1) >= 0).all()
        if hopeful and reach(turns, length) == length:
            return float(f"{base:.2e}")
        base *= _STEP
    raise TokredError(f"no base up to {_LARGEST:g} reaches {length} positions", found=f"d = {d}")


def _samples(length: int) -> torch.Tensor:
    """Positions from 1 to L that are tried first: most bases fail at one of them."""
    even = torch.linspace(1, length, _SAMPLES).round()
    return even.to(torch.float64).unique()
