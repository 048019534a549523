"""tokred::super_token_pool: super tokens, each a mean of the patches that belong to it."""

from __future__ import annotations

from torch import Tensor

from . import _cells, _library


def reference(x: Tensor, affinity: Tensor, height: int, width: int, cell_height: int, cell_width: int) -> Tensor:
    """Sum of affinity * x over the sum of affinity, over the patches of the nine cells around each.

    Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, section 3.2. Patches that fill the grid up
    count in the denominator, and add nothing to the numerator.

    Args:
        x: real [B, N, C], N = height * width, raster order.
        affinity: float32 [B, cells, patches of a cell, 9], as `super_token_affinity` makes it.
        height, width, cell_height, cell_width: the grid and its cells, in patches.

    Returns:
        x's dtype [B, cells, C]; sums and the division are in float32.

    Raises:
        ValueError: x or affinity does not fit the grid.
    """
    cells = _cells.Cells(height, width, cell_height, cell_width)
    cells.check(x)
    cells.check_affinity(affinity)
    return _cells.pooled(cells, cells.cut(x), affinity).to(x.dtype)


super_token_pool = _library.define(
    "super_token_pool(Tensor x, Tensor affinity, int height, int width, int cell_height, int cell_width) -> Tensor",
    reference,
)
