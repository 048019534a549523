"""tokred::super_token_spread: give super tokens back to the patches that belong to them."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cells, _library


def reference(x: Tensor, affinity: Tensor, height: int, width: int, cell_height: int, cell_width: int) -> Tensor:
    """Each patch becomes the sum of affinity * super token over the nine cells around it.

    Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, section 3.2: token upsampling.

    Args:
        x: real [B, cells, C], super tokens.
        affinity: float32 [B, cells, patches of a cell, 9], as `super_token_affinity` makes it.
        height, width, cell_height, cell_width: the grid and its cells, in patches.

    Returns:
        x's dtype [B, N, C], N = height * width, raster order; sums are in float32. Contiguous.

    Raises:
        ValueError: x or affinity does not fit the grid.
    """
    cells = _cells.Cells(height, width, cell_height, cell_width)
    cells.check_affinity(affinity)
    if x.dim() != 3 or x.shape[1] != cells.rows * cells.columns:
        raise ValueError(f"x must be [B, {cells.rows * cells.columns}, C], not {list(x.shape)}")
    patches = affinity @ cells.around(x.to(torch.float32))
    return cells.join(patches).to(x.dtype).contiguous()


super_token_spread = _library.define(
    "super_token_spread(Tensor x, Tensor affinity, int height, int width, int cell_height, int cell_width) -> Tensor",
    reference,
)
