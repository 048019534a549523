"""tokred::last_valid: where each row's last real token is."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(padding_mask: Tensor) -> Tensor:
    """Index of the last non-zero entry of each row.

    Args:
        padding_mask: bool or number [B, T]; zero marks padding, on whichever side.

    Returns:
        int64 [B]; 0 for a row that is all padding.

    Raises:
        ValueError: not two-dimensional.
    """
    if padding_mask.dim() != 2:
        raise ValueError(f"padding_mask must be [B, T], not {list(padding_mask.shape)}")
    index = torch.arange(padding_mask.shape[1], device=padding_mask.device)
    return torch.where(padding_mask != 0, index, 0).amax(1)


last_valid = _library.define("last_valid(Tensor padding_mask) -> Tensor", reference)
