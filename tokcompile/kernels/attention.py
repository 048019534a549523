"""tokred::attention: attention under a two-dimensional padding mask, whatever each layer's number of cached keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library


def reference(query: Tensor, key: Tensor, value: Tensor, padding: Tensor, scale: float, is_causal: bool) -> Tensor:
    """Attend under a padding mask that may be longer or shorter than the keys.

    A mask made once for all layers is sized by one layer's cache; layers whose caches were shortened cannot use it. The
    two-dimensional mask that a caller passes fits them all: padding stands on the left, so its first Tk columns say
    which cached keys are padding, however many tokens were dropped after it.

    Args:
        query: [B, H, Tq, D].
        key, value: [B, Hkv, Tk, D], H a multiple of Hkv.
        padding: bool or int [B, N], nonzero for real tokens.
        scale: what scores are multiplied by.
        is_causal: each query sees the keys up to its own place, the last query being the last key.

    Returns:
        [B, H, Tq, D], dtype of query.
    """
    mask = seen_keys(padding, query.shape[-2], key.shape[-2], is_causal)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (_repeat(x, groups) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def seen_keys(padding: Tensor, queries: int, keys: int, is_causal: bool) -> Tensor:
    """Bool [B, 1, Tq or 1, Tk]: what queries see under a padding mask [B, N], as above."""
    mask = F.pad(padding.to(torch.bool), (0, keys), value=True)[:, None, None, :keys]
    if not is_causal:
        return mask
    place = torch.arange(queries, device=padding.device) + (keys - queries)
    return mask & (torch.arange(keys, device=padding.device)[None, :] <= place[:, None])


def _repeat(x: Tensor, groups: int) -> Tensor:
    batch, heads, tokens, width = x.shape
    return x[:, :, None].expand(batch, heads, groups, tokens, width).reshape(batch, heads * groups, tokens, width)


attention = _library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor padding, float scale, bool is_causal) -> Tensor",
    reference,
)
