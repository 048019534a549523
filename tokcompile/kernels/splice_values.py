"""tokred::splice_values: per-feature values at the places of a sequence where the features go."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(mask: Tensor, values: Tensor, fill: float) -> Tensor:
    """Put per-feature values where a splice puts the features, row by row in order.

    Args:
        mask: bool [B, T], True where a feature goes; as many True in all as there are values.
        values: [n, N], one value for each of N features of n images, any dtype.
        fill: what the other places get.

    Returns:
        [B, T], dtype of `values`.

    Raises:
        ValueError: mask is not bool [B, T], or values are not two-dimensional.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool or values.dim() != 2:
        raise ValueError(
            f"mask must be bool [B, T] and values [n, N], not {mask.dtype} {list(mask.shape)} and {list(values.shape)}"
        )
    flat = values.reshape(-1)
    rank = (mask.reshape(-1).cumsum(0) - 1).clamp(min=0, max=flat.shape[0] - 1).reshape(mask.shape)
    return torch.where(mask, flat[rank], torch.full((), fill, dtype=values.dtype, device=values.device))


splice_values = _library.define("splice_values(Tensor mask, Tensor values, float fill) -> Tensor", reference)
