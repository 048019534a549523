"""The Triton part of gather_pairs; the kernel is that of all gathers."""

from __future__ import annotations

from torch import Tensor

from . import _triton_gather as plans


def supports(cache: Tensor, pairs: Tensor) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    return plans.fault(cache, pairs)


def launch(cache: Tensor, pairs: Tensor) -> Tensor:
    """As the reference; contiguous."""
    return plans.gather(cache, pairs, plans.pairs_plan(cache, pairs))
