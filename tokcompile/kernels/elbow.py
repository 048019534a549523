"""tokred::elbow: how many clusters are worth their while."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(distortion: Tensor, first: int, offset: int) -> Tensor:
    """Choose a number of clusters where the curve of distortions bends most.

    Args:
        distortion: real [B, n], n >= 3: the distortion of first, first + 1, ..., first + n - 1 clusters.
        first: the least number of clusters, and the least that is chosen.
        offset: added to the place of the largest second difference in the list of these, which counts from 0. The
            number whose distortion the bend is at would be `first + 1`; published code uses 4 and adds no `first`.

    Returns:
        int64 [B], max(place + offset, first); the first of several equal bends.

    Raises:
        ValueError: fewer than three distortions.
    """
    if distortion.dim() != 2 or distortion.shape[1] < 3:
        raise ValueError(f"distortion must be [B, n] with n of 3 or more, not {list(distortion.shape)}")
    bend = distortion.to(torch.float32).diff(n=2, dim=1)
    return (bend.argmax(1) + offset).clamp(min=first)


elbow = _library.define("elbow(Tensor distortion, int first, int offset) -> Tensor", reference)
