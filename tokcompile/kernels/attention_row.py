"""tokred::attention_row: the attention probabilities of one query token per batch row."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library


def reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    index: Tensor,
    scale: float,
    is_causal: bool,
    softcap: float,
    heads: str,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax probabilities of the query row `index[b]`, reduced over heads. Costs one row, not Tq.

    Args:
        query: float [B, H, Tq, D].
        key: float [B, Hkv, Tk, D], H a multiple of Hkv (query head h reads key head h // (H // Hkv)).
        mask: bool (True is seen) or additive float, broadcastable to [B, H, Tq, Tk]; or None.
        index: int64 [B], in [0, Tq).
        scale: factor on the logits, usually D ** -0.5.
        is_causal: row i sees keys 0..i, as scaled_dot_product_attention has it.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0: none.
        heads: "mean", "max" or "sum".
        sinks: float [H] or [B, H], a logit of each head beside those of the keys; None without.

    Returns:
        float32 [B, Tk]; 0 everywhere for a fully masked row.

    Raises:
        ValueError: shapes that do not fit, unknown `heads`.
    """
    group = check(query, key, mask, index, heads)
    batch, count, _, depth = query.shape
    tokens = key.shape[2]
    where = index.view(batch, 1, 1, 1)
    row = query.gather(2, where.expand(batch, count, 1, depth)).to(torch.float32) * scale
    grouped = row.view(batch, key.shape[1], group, depth)
    logits = torch.matmul(grouped, key.to(torch.float32).transpose(2, 3)).view(batch, count, tokens)
    seen = None if mask is None else _mask_row(_attention.four_d(mask), where)
    causal = torch.arange(tokens, device=key.device) <= index[:, None, None] if is_causal else None
    sink = _attention.sinks_by_row(sinks, batch, count)
    weights, factor = _attention.exponentials(
        _attention.adjust(logits, seen, causal, softcap), None if sink is None else sink[:, :, None]
    )
    return _over_heads(weights * factor, heads)


def check(query: Tensor, key: Tensor, mask: Tensor | None, index: Tensor, heads: str) -> int:
    """Validate the arguments and return how many query heads share one key head. Raises ValueError."""
    group = _attention.check(query, key, mask, heads)
    if index.dim() != 1:
        raise ValueError(f"index must be int64 [B], not {list(index.shape)}")
    return group


def _mask_row(mask: Tensor, where: Tensor) -> Tensor:
    """Row `where[b]` of mask [B or 1, H or 1, Tq or 1, Tk or 1], as [B or 1, H or 1, Tk or 1]."""
    if mask.shape[2] == 1:
        return mask[:, :, 0]
    batch, (_, heads, _, keys) = where.shape[0], mask.shape
    return mask.expand(batch, -1, -1, -1).gather(2, where.expand(batch, heads, 1, keys)).squeeze(2)


def _over_heads(x: Tensor, heads: str) -> Tensor:
    """Reduce [B, H, Tk] over its heads."""
    if heads == "max":
        return x.amax(1)
    return x.mean(1) if heads == "mean" else x.sum(1)


attention_row = _library.define(
    "attention_row(Tensor query, Tensor key, Tensor? mask, Tensor index, float scale, bool is_causal, "
    "float softcap, str heads, Tensor? sinks=None) -> Tensor",
    reference,
    triton="triton_attention_row",
)
