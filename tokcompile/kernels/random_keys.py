"""tokred::random_keys: pseudo-random scores of keys, the same on every target, for each head its own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _hash, _library

HEAD_BITS = 8


def reference(cache: Tensor, valid: Tensor | None, seed: int) -> Tensor:
    """A hash of (seed, head, which real token of its row): no generator state, no dependence on batch or padding.

    Args:
        cache: [B, H, T, D], any dtype; only its shape and device matter. H <= 256.
        valid: bool [B, T], real tokens; None: all are.
        seed: any int64.

    Returns:
        float32 [B, H, T] in [0, 1), multiples of 2^-24.

    Raises:
        ValueError: cache is not [B, H, T, D], or has too many heads.
    """
    if cache.dim() != 4 or cache.shape[1] > 1 << HEAD_BITS:
        raise ValueError(f"cache must be [B, H, T, D] with at most {1 << HEAD_BITS} heads, not {list(cache.shape)}")
    batch, heads, tokens, _ = cache.shape
    index = torch.arange(tokens, device=cache.device)[None] if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
    head = torch.arange(heads, device=cache.device)[None, :, None]
    word = _hash.hashed((index[:, None] << HEAD_BITS) + head, seed)
    return ((word >> 8).to(torch.float32) * 2.0**-24).expand(batch, heads, tokens).contiguous()


random_keys = _library.define("random_keys(Tensor cache, Tensor? valid, int seed) -> Tensor", reference)
