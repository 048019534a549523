"""How many slots a sequence needs in which runs of tokens become one token each."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch


def markers(neighbours: Any, gone: Any, min_run: int) -> Any:
    """What can be left of tokens that are not kept: the markers of runs, and the tokens of runs that are too short.

    Args:
        neighbours: how many runs there can be: each ends before a kept token, or where a span of image tokens ends.
        gone: tokens that are not kept; may be symbolic, as `neighbours`.
        min_run: tokens of the shortest run that becomes a marker.

    Returns:
        The largest number that any arrangement gives, which is min(neighbours, gone) for `min_run` 1 and 2; of
        symbolic numbers, and larger `min_run`, one that is larger by `min_run` - 2 at most.
    """
    most = max(min_run - 1, 1)  # what a run can leave: one marker, or all its tokens where it is short
    if not (isinstance(neighbours, int) and isinstance(gone, int)):
        return torch.sym_min(gone, neighbours * most)
    if gone <= neighbours * most:
        return gone
    return (neighbours - 1) * most + 1  # one run at least is long


def expected_runs(kept: int, gone: int, spans: int) -> Fraction:
    """Runs that a random choice makes on average, where image tokens stand in spans of one length."""
    total = kept + gone
    inner = Fraction((total - spans) * gone * kept, total * (total - 1)) if total > 1 else Fraction(0)
    return inner + Fraction(spans * gone, total)
