"""tokred::pool_matrix: adaptive average pooling of a grid as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(like: Tensor, height: int, width: int, out_height: int, out_width: int) -> Tensor:
    """Weights of adaptive average pooling from a grid to another, as torch.nn.functional.adaptive_avg_pool2d has it.

    Along each side bin i of n covers the places floor(i * size / n) up to, and without, ceil((i + 1) * size / n). Bins
    overlap where n does not divide the size; where n is larger than the size, places are repeated.

    Args:
        like: any tensor; only its device matters.
        height, width: sides of the grid, >= 1.
        out_height, out_width: sides of the pooled grid, >= 1.

    Returns:
        float32 [1, out_height * out_width, height * width], both grids row by row, for `mix_tokens`. Rows sum to 1.

    Raises:
        ValueError: a side below 1.
    """
    if min(height, width, out_height, out_width) < 1:
        raise ValueError(f"cannot pool a grid of {height} x {width} to {out_height} x {out_width}")
    rows, columns = _bins(like, height, out_height), _bins(like, width, out_width)
    weights = rows[:, None, :, None] * columns[None, :, None, :]
    return weights.reshape(1, out_height * out_width, height * width)


def _bins(like: Tensor, size: int, count: int) -> Tensor:
    """float32 [count, size]: the share of each place in each bin of one side."""
    place = torch.arange(size, device=like.device)
    index = torch.arange(count, device=like.device)[:, None]
    start = index * size // count
    end = ((index + 1) * size + count - 1) // count
    return ((place >= start) & (place < end)) / (end - start).to(torch.float32)


pool_matrix = _library.define(
    "pool_matrix(Tensor like, int height, int width, int out_height, int out_width) -> Tensor", reference
)
