"""tokred::alike: whether two vectors of each row point the same way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library


def reference(one: Tensor, other: Tensor, threshold: float) -> Tensor:
    """Compare the cosine of two vectors with a threshold.

    Args:
        one, other: float [B, C]; compared as float32.
        threshold: -1 is always reached, and a number above 1 never.

    Returns:
        bool [B].

    Raises:
        ValueError: the two are not of one shape [B, C].
    """
    if one.dim() != 2 or one.shape != other.shape:
        raise ValueError(f"two vectors of each row must be [B, C], not {list(one.shape)} and {list(other.shape)}")
    cosine = F.cosine_similarity(one.to(torch.float32), other.to(torch.float32), dim=1)
    return cosine.clamp(-1, 1) >= threshold


alike = _library.define("alike(Tensor one, Tensor other, float threshold) -> Tensor", reference)
