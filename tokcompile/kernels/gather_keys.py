"""tokred::gather_keys: the tokens of a cache that stay, for each head its own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(cache: Tensor, index: Tensor) -> Tensor:
    """Gather tokens of a cache head by head.

    Args:
        cache: [B, H, T, D], any dtype.
        index: int64 [B, G, k] within [0, T). G = H: each head its own; G = 1: one choice for all; G a multiple of H:
            choice g is of head g // (G // H), as query heads share cached ones.

    Returns:
        [B, H, k, D], or [B, G, k, D] for G above H; contiguous: nothing of the longer cache is kept alive.

    Raises:
        ValueError: shapes that do not fit.
    """
    if cache.dim() != 4 or index.dim() != 3 or index.dtype != torch.int64:
        raise ValueError(_fault(cache, index))
    batch, heads, tokens, width = cache.shape
    choices, kept = index.shape[1], index.shape[2]
    if choices == 1:
        return cache.gather(2, index[..., None].expand(-1, heads, -1, width))
    if choices % heads:
        raise ValueError(_fault(cache, index))
    groups = choices // heads
    if groups == 1:
        return cache.gather(2, index[..., None].expand(-1, -1, -1, width))
    spread = cache[:, :, None].expand(batch, heads, groups, tokens, width)
    chosen = index.reshape(batch, heads, groups, kept, 1).expand(-1, -1, -1, -1, width)
    return spread.gather(3, chosen).reshape(batch, choices, kept, width)


def _fault(cache: Tensor, index: Tensor) -> str:
    return (
        f"cache and index must be [B, H, T, D] and int64 [B, G, k], not {list(cache.shape)} and {index.dtype} "
        f"{list(index.shape)}"
    )


gather_keys = _library.define(
    "gather_keys(Tensor cache, Tensor index) -> Tensor", reference, triton="triton_gather_keys"
)
