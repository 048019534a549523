"""tokred::attend_owned: attention to a cache in which any slot may hold a key of any head."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _attention, _library


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    owners: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(cap(query @ key^T * scale) + mask) @ value, each query over the keys of its own head alone.

    Keys and values are read as one head's, in one pass, and the queries of all heads as its queries.

    Args:
        query: float [B, H, Tq, D].
        key, value: [B, Hkv, N, D] and [B, Hkv, N, Dv], H a multiple of Hkv.
        owners: int64 [B, Hkv, N]: the head whose key a slot holds, 0 to Hkv - 1; queries of heads h with
            h // (H // Hkv) equal to it see the slot. -1: nobody does.
        mask: bool (True is seen) or additive float that hides, broadcastable to [B, H, Tq, M]: what queries see of the
            last M columns. Earlier ones are seen by all queries of their owner. None: all columns are.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0: none.
        sinks: [H] or [B, H], a logit of each head beside those of the keys, which gives its share to none; or None.

    Returns:
        [B, H, Tq, Dv], of the dtype of `value`.

    Raises:
        ValueError: numbers of heads that do not divide each other, or owners of other slots than the keys'.
    """
    batch, heads, queries = query.shape[:3]
    if heads % key.shape[1] or owners.dim() != 3 or owners.shape[1] != key.shape[1]:
        raise ValueError(
            f"{heads} query heads do not divide among {key.shape[1]} heads of keys, or owners {list(owners.shape)} are "
            "not [B, Hkv, N]"
        )
    seen = visible(owners, mask, heads, queries)
    query, key, value = (x.reshape(batch, 1, x.shape[1] * x.shape[2], x.shape[3]) for x in (query, key, value))
    if not softcap and sinks is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale)
    else:
        logits = query.to(torch.float32) @ key.to(torch.float32).transpose(2, 3) * scale
        sink = _attention.sinks_by_row(sinks, batch, heads)
        if sink is not None:
            sink = sink[:, :, None].expand(batch, heads, queries).reshape(batch, 1, heads * queries, 1)
        weights, share = _attention.exponentials(_attention.adjust(logits, seen, None, softcap), sink)
        out = (weights * share).to(value.dtype) @ value
    return out.reshape(batch, heads, queries, value.shape[3])


def visible(owners: Tensor, mask: Tensor | None, heads: int, queries: int) -> Tensor:
    """bool [B, 1, H * Tq, Hkv * N]: the slots that each query sees; arguments as above."""
    batch, slots, columns = owners.shape
    groups = heads // slots
    head = torch.arange(slots, device=owners.device).view(1, slots, 1, 1, 1, 1)
    seen = owners.view(batch, 1, 1, 1, slots, columns) == head
    seen = seen.expand(batch, slots, groups, queries, slots, columns)
    if mask is not None:
        mask = _attention.four_d(mask)
        mask = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        mask = F.pad(mask, (columns - mask.shape[3], 0), value=True)
        mask = mask.expand(-1, heads, -1, -1).reshape(mask.shape[0], slots, groups, mask.shape[2], 1, columns)
        seen = seen & mask
    return seen.reshape(batch, 1, heads * queries, slots * columns)


attend_owned = _library.define(
    "attend_owned(Tensor query, Tensor key, Tensor value, Tensor owners, Tensor? mask, float scale, float softcap, "
    "Tensor? sinks=None) -> Tensor",
    reference,
)
