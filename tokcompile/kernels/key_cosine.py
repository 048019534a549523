"""tokred::key_cosine: how alike each key is to the mean direction of its head's keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library


def reference(cache: Tensor, valid: Tensor | None) -> Tensor:
    """cos(k_j, mean over real i of k_i / |k_i|), head by head.

    Args:
        cache: float [B, H, T, D].
        valid: bool [B, T], real tokens; None: all are.

    Returns:
        float32 [B, H, T]; 0 where a key, or the mean, is 0.

    Raises:
        ValueError: cache is not [B, H, T, D].
    """
    if cache.dim() != 4:
        raise ValueError(f"cache must be [B, H, T, D], not {list(cache.shape)}")
    unit = F.normalize(cache.to(torch.float32), dim=-1)
    # The mean's length cancels, so that a sum does.
    kept = unit if valid is None else torch.where(valid[:, None, :, None], unit, 0.0)
    return (unit @ F.normalize(kept.sum(2, keepdim=True), dim=-1).transpose(2, 3)).squeeze(3)


key_cosine = _library.define("key_cosine(Tensor cache, Tensor? valid) -> Tensor", reference)
