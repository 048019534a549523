"""The Triton part of gather_keys; the kernel is that of all gathers."""

from __future__ import annotations

from torch import Tensor

from . import _triton_gather as plans


def supports(cache: Tensor, index: Tensor) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    return plans.fault(cache, index)


def launch(cache: Tensor, index: Tensor) -> Tensor:
    """As the reference; contiguous."""
    return plans.gather(cache, index, plans.keys_plan(cache, index))
