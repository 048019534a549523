"""tokred::attention_received: how much attention each key gets, without the attention matrix of all heads.

Cost under Inductor, relative to one F.scaled_dot_product_attention on the same q, k and v (float32, AVX2; one core, or
two with OMP_WAIT_POLICY=passive): 0.85 at B 32, H 4, T 197, D 32; 0.7 at B 1, H 16, T 577, D 64. On cores that other
processes keep busy its many short parallel regions wait more often than attention's one: up to 3 times attention.
Slower when tried: a log-sum-exp pass and then exp; softmax and then a sum; the column sum as a pointwise product and a
reduction. All heads in one batch was no faster, and takes the memory that this op is there to save.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import _attention, _columns, _library

REDUCE = ("sum", "mean")


def reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    heads: str,
    reduce: str,
    sinks: Tensor | None = None,
) -> Tensor:
    """Reduce softmax(query @ key^T * scale) over query rows, then over heads.

    Args:
        query: float [B, H, Tq, D].
        key: float [B, Hkv, Tk, D], H a multiple of Hkv (query head h reads key head h // (H // Hkv)).
        mask: bool (True is seen) or additive float, broadcastable to [B, H, Tq, Tk]; or None.
        rows: bool [B, Tq], the query rows that count; None: all.
        scale: factor on the logits, usually D ** -0.5.
        is_causal: row i sees keys 0..i, as scaled_dot_product_attention has it.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0: none.
        heads: "mean", "max" or "sum" over heads, after the rows were reduced.
        sinks: float [H] or [B, H], a logit of each head beside those of the keys; None without.
        reduce: "sum", or "mean" over the counted rows (a fully masked row counts and adds 0; no rows at all give 0).

    Returns:
        float32 [B, Tk]; probabilities are float32 whatever the inputs are.

    Raises:
        ValueError: shapes that do not fit, unknown `heads` or `reduce`.
    """

    def columns(hidden: Tensor | None) -> Tensor:
        return _columns.over_heads(query, key, hidden, rows, scale, is_causal, softcap, heads, sinks, 1)

    return reduced(columns, query, key, mask, rows, heads, reduce)


def reduced(
    columns: Callable[[Tensor | None], Tensor],
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    heads: str,
    reduce: str,
) -> Tensor:
    """Check the arguments, and finish what `columns` sums up: float32 [B, 1, Tk] of a four-dimensional mask."""
    _attention.check(query, key, mask, heads)
    if reduce not in REDUCE:
        raise ValueError(f"reduce must be one of {', '.join(REDUCE)}, not {reduce!r}")
    if rows is not None and (rows.dim() != 2 or rows.dtype != torch.bool):
        raise ValueError(f"rows must be bool [B, Tq], not {rows.dtype} {list(rows.shape)}")
    total = columns(None if mask is None else _attention.four_d(mask)).squeeze(1)
    if reduce == "sum":
        return total
    return total / (query.shape[2] if rows is None else rows.sum(1, keepdim=True).clamp(min=1))


attention_received = _library.define(
    "attention_received(Tensor query, Tensor key, Tensor? mask, Tensor? rows, float scale, bool is_causal, "
    "float softcap, str heads, str reduce, Tensor? sinks=None) -> Tensor",
    reference,
    triton="triton_attention_received",
)
