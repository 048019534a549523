"""tokred::cluster_labels: the centre that each token belongs to."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _distance, _library


def reference(x: Tensor, centres: Tensor) -> Tensor:
    """Give each token to the nearest centre; the first of several at one distance, and a centre to itself.

    Args:
        x: real [B, T, C], compared as float32.
        centres: int64 [B, M], token indices, all different in a row.

    Returns:
        int64 [B, T], the number of the centre in its row, in [0, M).

    Raises:
        ValueError: other ranks.
    """
    if x.dim() != 3 or centres.dim() != 2:
        raise ValueError(f"x must be [B, T, C] and centres [B, M], not {list(x.shape)} and {list(centres.shape)}")
    middle = x.gather(1, centres.unsqueeze(2).expand(-1, -1, x.shape[2]))
    nearest = _distance.distances(middle, x).argmin(1)
    # Where centres are alike the nearest one of a centre may be another.
    number = torch.arange(centres.shape[1], device=x.device).expand(centres.shape)
    return nearest.scatter(1, centres, number)


cluster_labels = _library.define("cluster_labels(Tensor x, Tensor centres) -> Tensor", reference)
