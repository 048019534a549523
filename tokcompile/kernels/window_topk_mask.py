"""tokred::window_topk_mask: the k best-scored tokens of each window of the patch grid, as a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _order


def reference(scores: Tensor, height: int, width: int, rows: int, columns: int, k: int) -> Tensor:
    """Cut the grid into rows x columns windows of one size and mark the k best-scored tokens of each.

    Args:
        scores: real [B, N], N = height * width, raster order; compared as float32.
        height, width: the patch grid.
        rows, columns: how many windows stand above and beside each other; they divide the grid.
        k: static or symbolic, 0 <= k <= the tokens of a window.

    Returns:
        bool [B, N] with rows * columns * k True in each row. Ties go to the lowest index; NaN ranks below -inf.

    Raises:
        ValueError: N != height * width, or windows that do not divide the grid. RuntimeError: k out of range.
    """
    _order.check_rows(scores, [])
    if scores.shape[1] != height * width:
        raise ValueError(f"scores must be [B, {height}*{width}], not {list(scores.shape)}")
    if rows < 1 or columns < 1 or height % rows or width % columns:
        raise ValueError(f"{rows} x {columns} windows do not divide a grid of {height} x {width}")
    high, wide = height // rows, width // columns
    windows = scores.reshape(-1, rows, high, columns, wide).permute(0, 1, 3, 2, 4).reshape(-1, high * wide)
    everything = torch.ones_like(windows, dtype=torch.int64)
    mask = _order.largest(_order.pack(everything, windows, everything > 0), k)
    return mask.reshape(-1, rows, columns, high, wide).permute(0, 1, 3, 2, 4).reshape(scores.shape)


window_topk_mask = _library.define(
    "window_topk_mask(Tensor scores, int height, int width, int rows, int columns, SymInt k) -> Tensor",
    reference,
    triton="triton_window_topk_mask",
)
