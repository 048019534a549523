"""tokred::close_gaps: number what is left of each image on from the image's start."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(positions: Tensor, starts: Tensor) -> Tensor:
    """Give the tokens of each image consecutive positions from its start on; tokens of text keep theirs.

    Args:
        positions: integers [B or 1, T].
        starts: int64 [B, T], the position at which each token's image begins, -1 for text. They do not fall from image
            to image; tokens with one start are of one image.

    Returns:
        int64 [B, T].

    Raises:
        ValueError: starts is not int64 [B, T].
    """
    if starts.dim() != 2 or starts.dtype != torch.int64:
        raise ValueError(f"starts must be int64 [B, T], not {starts.dtype} {list(starts.shape)}")
    image = starts >= 0
    before = torch.nn.functional.pad(starts.cummax(1).values, (1, 0), value=-1)[:, :-1]
    count = image.long().cumsum(1)
    base = torch.where(image & (starts > before), count, 0).cummax(1).values
    return torch.where(image, starts + count - base, positions.long())


close_gaps = _library.define("close_gaps(Tensor positions, Tensor starts) -> Tensor", reference)
