"""tokred::masked_mean: the mean of some tokens of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, mask: Tensor) -> Tensor:
    """Average the tokens under a mask.

    Args:
        x: float [B, T, C].
        mask: bool [B, T].

    Returns:
        [B, C] in x's dtype, of sums in float32; 0 for a row without any.

    Raises:
        ValueError: x is not [B, T, C] or mask not [B, T].
    """
    if x.dim() != 3 or mask.dim() != 2:
        raise ValueError(f"x must be [B, T, C] and mask [B, T], not {list(x.shape)} and {list(mask.shape)}")
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    total = torch.where(mask[:, :, None], wide, 0).sum(1)
    return (total / mask.sum(1, keepdim=True).clamp(min=1)).to(x.dtype)


masked_mean = _library.define("masked_mean(Tensor x, Tensor mask) -> Tensor", reference)
