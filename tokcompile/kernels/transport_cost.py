"""tokred::transport_cost: what it costs to pour each dropped token into each kept one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _vectors


def reference(
    kept: Tensor, gone: Tensor, kept_at: Tensor, gone_at: Tensor, height: int, width: int, distance: float
) -> Tensor:
    """(1 - cosine) + distance * ||p - p'||, p the place of a token on the patch grid.

    AOT (TyroneLi/AOT at 88455ee, `llava_arch.py`), the transport within a frame, with distance = 0.5.

    Args:
        kept, gone: real [B, n, C] and [B, M, C], compared as float32; a zero vector has cosine 0 to all.
        kept_at, gone_at: int64 [B, n] and [B, M], the raster indices of the tokens.
        height, width: the grid. Rows and columns are spaced evenly in [0, 1]; a single one lies at 0.
        distance: weight of the distance on the grid; from 0 to sqrt(2) before it.

    Returns:
        float32 [B, n, M].

    Raises:
        ValueError: values of other shapes, or a grid without patches.
    """
    if height < 1 or width < 1:
        raise ValueError(f"a grid has at least one row and one column, not {height} x {width}")
    if kept_at.shape != kept.shape[:2] or gone_at.shape != gone.shape[:2]:
        raise ValueError(f"places {list(kept_at.shape)} and {list(gone_at.shape)} must be [B, n] and [B, M]")
    rows = _apart(kept_at // width, gone_at // width, height)
    columns = _apart(kept_at % width, gone_at % width, width)
    # Integers to the root's argument: equal places are 0 apart, in whatever way the target computes.
    return (1 - _vectors.cosines(kept, gone)) + distance * (rows.square() + columns.square()).sqrt()


def _apart(one: Tensor, other: Tensor, count: int) -> Tensor:
    """float32 [B, n, M]: how far apart numbers of rows or columns are when all lie in [0, 1]."""
    steps = one.unsqueeze(2) - other.unsqueeze(1)
    return steps.to(torch.float32) / max(count - 1, 1)


transport_cost = _library.define(
    "transport_cost(Tensor kept, Tensor gone, Tensor kept_at, Tensor gone_at, int height, int width, float distance)"
    " -> Tensor",
    reference,
)
