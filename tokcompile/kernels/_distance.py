"""Distances of tokens, for the ops that cluster."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(x: Tensor, y: Tensor) -> Tensor:
    """||x_i - y_j|| / sqrt(C), float32 [B, T, S], of [B, T, C] and [B, S, C]. Equal tokens are exactly 0 apart."""
    # By a product of matrices equal tokens would be apart by what rounding leaves, and so would clusters of them.
    apart = torch.cdist(x.to(torch.float32), y.to(torch.float32), compute_mode="donot_use_mm_for_euclid_dist")
    return apart / x.shape[-1] ** 0.5
