"""tokred::dilate_by_width: `dilate` on grids whose width is known only when the graph runs, one a row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .dilate import EDGES


def reference(mask: Tensor, offsets_y: list[int], offsets_x: list[int], width: Tensor, edges: str) -> Tensor:
    """Mark every token that lies at one of the offsets from a marked one.

    Args:
        mask: bool [B, N], raster order.
        offsets_y, offsets_x: the stencil, one (dy, dx) a pair of entries; list (0, 0) to keep the token itself.
        width: int64 [B], columns of each row's grid, at least 1.
        edges: as in `dilate`.

    Returns:
        bool [B, N].

    Raises:
        ValueError: unknown `edges`, offsets of unequal length, or shapes that do not fit.
    """
    if edges not in EDGES:
        raise ValueError(f"edges must be one of {', '.join(EDGES)}, not {edges!r}")
    if len(offsets_y) != len(offsets_x):
        raise ValueError(f"{len(offsets_y)} offsets_y but {len(offsets_x)} offsets_x")
    if mask.dim() != 2 or mask.dtype != torch.bool or list(width.shape) != [mask.shape[0]]:
        raise ValueError(f"mask must be bool [B, N] and width [B], not {list(mask.shape)} and {list(width.shape)}")
    tokens = mask.shape[1]
    index = torch.arange(tokens, device=mask.device)
    columns = width[:, None]
    # One more place, for what runs off a grid; counts, so that several may meet in one place.
    reached = torch.zeros(mask.shape[0], tokens + 1, dtype=torch.int64, device=mask.device)
    for dy, dx in zip(offsets_y, offsets_x, strict=True):
        goal = (index + dy * columns + dx).clamp(0, tokens - 1)
        if edges == "grid":
            column = index % columns + dx
            row = index // columns + dy
            inside = (column >= 0) & (column < columns) & (row >= 0) & (row * columns + column < tokens)
            goal = torch.where(inside, goal, tokens)
        reached = reached.scatter_add(1, goal, mask.to(torch.int64))
    return reached[:, :tokens] > 0


dilate_by_width = _library.define(
    "dilate_by_width(Tensor mask, int[] offsets_y, int[] offsets_x, Tensor width, str edges) -> Tensor", reference
)
