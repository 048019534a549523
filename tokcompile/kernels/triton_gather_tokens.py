"""The Triton part of gather_tokens; the kernel is that of all gathers."""

from __future__ import annotations

from torch import Tensor

from . import _triton_gather as plans


def supports(x: Tensor, source: Tensor, dim: int, batch_dim: int) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del dim, batch_dim
    return plans.fault(x, source)


def launch(x: Tensor, source: Tensor, dim: int, batch_dim: int) -> Tensor:
    """As the reference; contiguous."""
    return plans.gather(x, source, plans.tokens_plan(x, source, dim, batch_dim))
