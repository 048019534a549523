"""tokred::super_token_affinity: how far each patch belongs to the super tokens around it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cells, _library


def reference(
    x: Tensor, height: int, width: int, cell_height: int, cell_width: int, iterations: int, mask_ghosts: bool
) -> Tensor:
    """Softmax over the nine cells around a patch of x . centre / sqrt(C).

    Huang et al., "Vision Transformer with Super Token Sampling", CVPR 2023, section 3.2 (hhb072/STViT at c9ed9a4).
    Centres begin as the means of the cells; each further iteration takes the super tokens of the last. Patches that
    fill the grid up to whole cells are zero, and take part.

    Args:
        x: real [B, N, C], N = height * width, raster order; computed with as float32, without gradient.
        height, width: the patch grid.
        cell_height, cell_width: patches of a cell.
        iterations: at least 1.
        mask_ghosts: whether neighbours off the grid get nothing. Else they are zero vectors with logit 0, as in the
            released model, so that patches of cells at the edge belong to super tokens by less than 1.

    Returns:
        float32 [B, cells, patches of a cell, 9], cells and the patches of each in raster order; neighbour 3 * ky + kx
        is the cell ky - 1 down and kx - 1 to the right.

    Raises:
        ValueError: x is not [B, N, C], a side below 1, or no iteration.
    """
    cells = _cells.Cells(height, width, cell_height, cell_width)
    cells.check(x)
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, not {iterations}")
    patches = cells.cut(x.detach())
    centres = patches.mean(2)
    affinity = _affinity(cells, patches, centres, mask_ghosts)
    for _ in range(iterations - 1):
        affinity = _affinity(cells, patches, _cells.pooled(cells, patches, affinity), mask_ghosts)
    return affinity


def _affinity(cells: _cells.Cells, patches: Tensor, centres: Tensor, mask_ghosts: bool) -> Tensor:
    logits = patches @ cells.around(centres).transpose(2, 3) * patches.shape[-1] ** -0.5
    if mask_ghosts:
        there = cells.around(torch.ones_like(centres[..., :1])).transpose(2, 3)
        logits = torch.where(there > 0, logits, -torch.inf)
    return logits.softmax(-1)


super_token_affinity = _library.define(
    "super_token_affinity(Tensor x, int height, int width, int cell_height, int cell_width, int iterations,"
    " bool mask_ghosts) -> Tensor",
    reference,
)
