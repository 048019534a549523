"""The Triton part of gather_mask; the kernel is that of all gathers."""

from __future__ import annotations

from torch import Tensor

from . import _triton_gather as plans


def supports(mask: Tensor, index: Tensor) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    return plans.fault(mask, index)


def launch(mask: Tensor, index: Tensor) -> Tensor:
    """As the reference; contiguous."""
    return plans.gather(mask, index, plans.mask_plan(mask, index))
