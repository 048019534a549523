"""What ops that compare vectors share."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length one; zero vectors stay zero."""
    # Dividing by the largest entry first keeps the squares of very small and very large vectors in range.
    peak = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(peak == 0, 1.0, peak)
    norm = torch.linalg.vector_norm(scaled, 2.0, dim=-1, keepdim=True)
    return scaled / torch.where(norm == 0, 1.0, norm)


def likeness(left: Tensor, right: Tensor) -> Tensor:
    """Dot products float32 [B, T, S] of float32 [B, T, C] and [B, S, C].

    Added up in float64: a matrix product sums its last columns in another order than its first, and in float32 equal
    tokens would no longer tie.
    """
    return torch.matmul(left.to(torch.float64), right.to(torch.float64).transpose(1, 2)).to(torch.float32)


def cosines(kept: Tensor, gone: Tensor) -> Tensor:
    """Cosine of each token of [B, n, C] and each of [B, M, C], float32 [B, n, M]; a zero vector has 0 to all.

    Raises:
        ValueError: values of other shapes.
    """
    if kept.dim() != 3 or gone.dim() != 3 or kept.shape[-1] != gone.shape[-1]:
        raise ValueError(f"kept must be [B, n, C] and gone [B, M, C], not {list(kept.shape)} and {list(gone.shape)}")
    return likeness(unit(kept.to(torch.float32)), unit(gone.to(torch.float32)))
