"""tokred::key_attention in Triton: two passes over tiles of logits, see `_triton_columns`.

The rows of a window are read where they are: neither queries nor a mask of the window are copied.
"""

from __future__ import annotations

from torch import Tensor

from . import _attention, _triton_columns, _triton_tiles, triton_key_viewers
from .key_attention import check, last_places


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(
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
    """What the reference computes, with its arguments, results and errors; memory is linear in tokens."""
    check(query, key, mask, valid, window, cache_heads, heads, reduce)
    batch, _, tokens, _ = query.shape
    hidden = None if mask is None else _attention.four_d(mask)
    places = last_places(valid, batch, tokens, window, query.device) if window else None
    rows = None if window else valid
    out = _triton_columns.over_heads(
        query, key, hidden, rows, places, scale, is_causal, softcap, heads, sinks, cache_heads
    )
    if reduce == "sum":
        return out
    if reduce == "seen":
        seen = triton_key_viewers.viewers(query, key.shape[2], hidden, rows, places, is_causal)
        return out / seen.clamp(min=1)[:, None]
    if places is None and rows is None:
        return out / tokens
    counted = rows if places is None else places >= 0
    return out / counted.sum(1).clamp(min=1)[:, None, None]
