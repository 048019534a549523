"""tokred::attend in Triton: the queries that share keys read them once, and long caches are cut into parts."""

from __future__ import annotations

from torch import Tensor

from . import _triton_attend, _triton_tiles
from .attend import check


def supports(query: Tensor, key: Tensor, value: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key, value)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """What the reference computes, with its arguments, result and errors; contiguous."""
    check(query, key, mask)
    return _triton_attend.attended(query, key, value, mask, None, scale, softcap, sinks)
