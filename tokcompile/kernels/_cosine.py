"""Vectors of length one, for the ops that compare tokens by their direction."""

from __future__ import annotations

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension of real float values to length one; zero vectors stay zero."""
    # Dividing by the largest entry first keeps the squares of very small and very large vectors in range.
    peak = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(peak == 0, 1.0, peak)
    norm = torch.linalg.vector_norm(scaled, 2.0, dim=-1, keepdim=True)
    return scaled / torch.where(norm == 0, 1.0, norm)


def cosines(kept: Tensor, gone: Tensor) -> Tensor:
    """Cosine of each kept token [B, n, C] and each other one [B, M, C], float32 [B, n, M].

    Raises:
        ValueError: the values are not [B, n, C] and [B, M, C].
    """
    if kept.dim() != 3 or gone.dim() != 3 or kept.shape[-1] != gone.shape[-1]:
        raise ValueError(f"kept must be [B, n, C] and gone [B, M, C], not {list(kept.shape)} and {list(gone.shape)}")
    return unit(kept.to(torch.float32)) @ unit(gone.to(torch.float32)).transpose(1, 2)
