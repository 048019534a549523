"""tokred::gather_keys: the tokens of a cache that stay, for each head its own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(cache: Tensor, index: Tensor) -> Tensor:
    """Gather tokens of a cache head by head.

    Args:
        cache: [B, H, T, D], any dtype.
        index: int64 [B, H, k] or, for one choice of all heads, [B, 1, k]; within [0, T).

    Returns:
        [B, H, k, D], contiguous: nothing of the longer cache is kept alive.

    Raises:
        ValueError: shapes that do not fit.
    """
    if cache.dim() != 4 or index.dim() != 3 or index.dtype != torch.int64 or index.shape[1] not in (1, cache.shape[1]):
        raise ValueError(
            f"cache and index must be [B, H, T, D] and int64 [B, H, k], not {list(cache.shape)} and {index.dtype} "
            f"{list(index.shape)}"
        )
    chosen = index[..., None].expand(-1, cache.shape[1], -1, cache.shape[3])
    return cache.gather(2, chosen)


gather_keys = _library.define("gather_keys(Tensor cache, Tensor index) -> Tensor", reference)
