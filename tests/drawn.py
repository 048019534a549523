"""Random inputs for tests of operators, the same for the same seed."""

from __future__ import annotations

import torch
from torch import Tensor


def made(seed: int, *shape: int) -> Tensor:
    """Normal numbers, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded(seed: int, batch: int, tokens: int) -> Tensor:
    """Real tokens of each row, at least one, wherever they stand, bool [B, T]."""
    real = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) > 0.4
    real[:, seed % tokens] = True
    return real
