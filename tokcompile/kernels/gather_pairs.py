"""tokred::gather_pairs: the tokens of a cache that stay, of each head as many as were chosen of it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(cache: Tensor, pairs: Tensor) -> Tensor:
    """Gather pairs of a head and a token, whatever head their new slots are of.

    Args:
        cache: [B, H, T, D], any dtype.
        pairs: int64 [B, H, k], head * T + token.

    Returns:
        [B, H, k, D], contiguous: nothing of the longer cache is kept alive.

    Raises:
        ValueError: shapes that do not fit.
    """
    if cache.dim() != 4 or pairs.dim() != 3 or pairs.dtype != torch.int64 or pairs.shape[1] != cache.shape[1]:
        raise ValueError(
            f"cache and pairs must be [B, H, T, D] and int64 [B, H, k], not {list(cache.shape)} and {pairs.dtype} "
            f"{list(pairs.shape)}"
        )
    # Values are often a transposed view, which a flat gather would copy whole.
    rows = torch.arange(cache.shape[0], device=cache.device)[:, None, None]
    return cache[rows, pairs // cache.shape[2], pairs % cache.shape[2]].contiguous()


gather_pairs = _library.define(
    "gather_pairs(Tensor cache, Tensor pairs) -> Tensor", reference, triton="triton_gather_pairs"
)
