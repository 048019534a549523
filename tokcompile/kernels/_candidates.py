"""Which tokens of a row are up for choice among the keys of a cache."""

from __future__ import annotations

import torch
from torch import Tensor


def between_ends(
    valid: Tensor | None, among: Tensor | None, batch: int, tokens: int, first: int, last: int, device: torch.device
) -> Tensor:
    """bool [B, T]: real tokens, without so many at either end of a row, and of those in `among` alone.

    Args:
        valid, among: bool [B, T]; None: all.
    """
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if valid is None else valid
    rank = real.cumsum(1)
    inside = real & (rank > first) & (rank <= rank[:, -1:] - last)
    return inside if among is None else inside & among
