"""tokred::key_attention: how much attention each key gets, for each head of a cache, from all queries or the last."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _attention, _columns, _library

REDUCE = ("sum", "mean", "seen")


def reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    window: int,
    cache_heads: int,
    scale: float,
    is_causal: bool,
    softcap: float,
    heads: str,
    reduce: str,
    sinks: Tensor | None = None,
) -> Tensor:
    """Reduce softmax(query @ key^T * scale) over query rows, then over the query heads that share a cached head.

    Args:
        query: float [B, H, Tq, D].
        key: float [B, Hkv, Tk, D], H a multiple of Hkv (query head h reads key head h // (H // Hkv)).
        mask: bool (True is seen) or additive float, broadcastable to [B, H, Tq, Tk]; or None. All heads hide the same.
        valid: bool [B, Tq], the queries of real tokens; None: all are.
        window: the last so many real queries of each row count; 0: all. Where fewer are real, those count.
        cache_heads: heads of the result, which H is a multiple of.
        scale: factor on the logits, usually D ** -0.5.
        is_causal: row i sees keys 0..i, as scaled_dot_product_attention has it.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0: none.
        heads: "mean", "max" or "sum" over the query heads of a cached head, after the rows were reduced.
        reduce: "sum" over the rows that count, "mean" over them, or "seen": over those of them that see the key. A key
            that none sees has 0.
        sinks: float [H] or [B, H], a logit of each head beside those of the keys; None without.

    Returns:
        float32 [B, cache_heads, Tk]; probabilities are float32 whatever the inputs are.

    Raises:
        ValueError: shapes that do not fit, unknown `heads` or `reduce`, a negative window.
    """
    check(query, key, mask, valid, window, cache_heads, heads, reduce)
    hidden = None if mask is None else _attention.four_d(mask)
    rows = valid
    if window:
        query, hidden, rows = windowed(query, key.shape[2], hidden, valid, window, is_causal)
        is_causal = False
    out = _columns.over_heads(query, key, hidden, rows, scale, is_causal, softcap, heads, sinks, cache_heads)
    if reduce == "sum":
        return out
    counted = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if rows is None else rows
    if reduce == "mean":
        return out / counted.sum(1).clamp(min=1)[:, None, None]
    return out / seeing(counted, key.shape[2], hidden, is_causal).clamp(min=1)[:, None]


def check(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    valid: Tensor | None,
    window: int,
    cache_heads: int,
    heads: str,
    reduce: str,
) -> None:
    """Refuse arguments of the operator that do not fit. Raises ValueError."""
    _attention.check(query, key, mask, heads)
    if reduce not in REDUCE:
        raise ValueError(f"reduce must be one of {', '.join(REDUCE)}, not {reduce!r}")
    if valid is not None and (valid.dim() != 2 or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [B, Tq], not {valid.dtype} {list(valid.shape)}")
    if window < 0:
        raise ValueError(f"window must not be negative, not {window}")
    if cache_heads < 1 or query.shape[1] % cache_heads:
        raise ValueError(f"{query.shape[1]} query heads do not divide among {cache_heads} cached heads")


def windowed(
    query: Tensor, keys: int, hidden: Tensor | None, valid: Tensor | None, window: int, is_causal: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The last real queries [B, H, W, D], what is hidden from them, and bool [B, W]: which of them there are."""
    places = last_places(valid, query.shape[0], query.shape[2], window, query.device)
    index = places.clamp(min=0)
    if hidden is not None and hidden.shape[2] != 1:
        hidden = _pick(hidden.expand(query.shape[0], -1, -1, -1), index)
    if is_causal:
        seen = (torch.arange(keys, device=query.device) <= index[:, :, None])[:, None]
        if hidden is None:
            hidden = seen
        elif hidden.dtype == torch.bool:
            hidden = hidden & seen
        else:
            hidden = torch.where(seen, hidden, -torch.inf)
    return _pick(query, index), hidden, places >= 0


def last_places(valid: Tensor | None, batch: int, tokens: int, window: int, device: torch.device) -> Tensor:
    """int64 [B, W]: where the last real tokens of each row stand, ascending; -1 in front where there are fewer.

    Args:
        valid: bool [B, T]; None: all tokens are real.
    """
    index = torch.arange(tokens, device=device).expand(batch, tokens)
    rank = index + 1 if valid is None else valid.cumsum(1)
    slot = rank - 1 + window - rank[:, -1:]
    wanted = slot >= 0 if valid is None else valid & (slot >= 0)
    # With room for every token, because TensorRT scatters into tensors no smaller than the indices.
    empty = torch.full((batch, window + tokens), -1, dtype=torch.int64, device=device)
    return empty.scatter(1, torch.where(wanted, slot, window), index)[:, :window]


def _pick(value: Tensor, index: Tensor) -> Tensor:
    """Rows [B, H, W, N] of a value [B, H, T, N] by index [B, W]."""
    shape = (value.shape[0], value.shape[1], index.shape[1], value.shape[3])
    return value.gather(2, index[:, None, :, None].expand(shape))


def seeing(counted: Tensor, keys: int, hidden: Tensor | None, is_causal: bool) -> Tensor:
    """float32 [B, Tk]: how many of the rows that count see each key."""
    rows = counted.to(torch.float32)
    if hidden is None and not is_causal:
        return rows.sum(1, keepdim=True).expand(-1, keys)
    if hidden is None:
        # Later rows, of as many keys as there are: no row sees a key after the last row.
        return F.pad(rows.flip(1).cumsum(1).flip(1), (0, keys - rows.shape[1]))
    plane = hidden[:, 0]
    seen = plane if plane.dtype == torch.bool else plane > _attention.LOWEST / 2
    if is_causal:
        order = torch.arange(rows.shape[1], device=rows.device)[:, None]
        seen = seen & (torch.arange(keys, device=rows.device) <= order)
    seen = seen.expand(rows.shape[0], rows.shape[1], keys).to(torch.float32)
    return torch.bmm(rows[:, None], seen).squeeze(1)


key_attention = _library.define(
    "key_attention(Tensor query, Tensor key, Tensor? mask, Tensor? valid, int window, int cache_heads, float scale, "
    "bool is_causal, float softcap, str heads, str reduce, Tensor? sinks=None) -> Tensor",
    reference,
    triton="triton_key_attention",
)
