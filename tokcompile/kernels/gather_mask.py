"""tokred::gather_mask: the columns of an attention mask that belong to chosen keys."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library


def reference(mask: Tensor, index: Tensor) -> Tensor:
    """Take from a mask the columns of chosen keys.

    Args:
        mask: bool or float, broadcastable to [B, H, Tq, N]; its last dimension is N.
        index: int64 [B, G, k] within [0, N), one choice for each of G heads or for all (G = 1). Of the two numbers of
            heads the larger is a multiple of the other, and head h reads head h // (larger // smaller) of the smaller.

    Returns:
        [B, H or G, Tq or 1, k], of the mask's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if index.dim() != 3 or index.dtype != torch.int64 or not 2 <= mask.dim() <= 4:
        raise ValueError(f"index must be int64 [B, G, k], not {index.dtype} {list(index.shape)}")
    mask = _attention.four_d(mask)
    heads = max(mask.shape[1], index.shape[1])
    if any(heads % n for n in (mask.shape[1], index.shape[1])):
        raise ValueError(f"{mask.shape[1]} heads of a mask and {index.shape[1]} choices do not divide each other")
    index = index.repeat_interleave(heads // index.shape[1], 1)
    mask = mask.repeat_interleave(heads // mask.shape[1], 1) if mask.shape[1] > 1 else mask
    batch, _, chosen = index.shape
    whole = mask.expand(batch, heads, mask.shape[2], mask.shape[3])
    return whole.gather(3, index[:, :, None].expand(batch, heads, mask.shape[2], chosen))


gather_mask = _library.define(
    "gather_mask(Tensor mask, Tensor index) -> Tensor", reference, triton="triton_gather_mask"
)
