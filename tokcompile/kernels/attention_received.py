"""tokred::attention_received: how much attention each key gets, without the attention matrix of all heads.

Cost under Inductor on one CPU core, relative to one F.scaled_dot_product_attention on the same q, k and v: RATIOS.
Slower when tried: a log-sum-exp pass and then exp (1.3 times); softmax and then a sum (1.2 times); the column sum as a
pointwise product and a reduction (1.2 to 1.5 times). All heads in one batch is as fast at best, and takes the memory
that this op is there to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library

REDUCE = ("sum", "mean")
# One block of logits is [B, rows, Tk]. Larger blocks leave the cache and cost memory, smaller ones make long graphs.
MAX_BLOCK = 1 << 22


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
        reduce: "sum", or "mean" over the counted rows (a fully masked row counts and adds 0; no rows at all give 0).

    Returns:
        float32 [B, Tk]; probabilities are float32 whatever the inputs are.

    Raises:
        ValueError: shapes that do not fit, unknown `heads` or `reduce`.
    """
    group = _attention.check(query, key, mask, heads)
    if reduce not in REDUCE:
        raise ValueError(f"reduce must be one of {', '.join(REDUCE)}, not {reduce!r}")
    if rows is not None and (rows.dim() != 2 or rows.dtype != torch.bool):
        raise ValueError(f"rows must be bool [B, Tq], not {rows.dtype} {list(rows.shape)}")
    hidden = None if mask is None else _attention.four_d(mask)
    query, key = query.to(torch.float32) * scale, key.to(torch.float32)
    total = query.new_zeros(query.shape[0], 1, key.shape[2])
    # One head at a time: three-dimensional blocks are all that ever exists.
    for head in range(query.shape[1]):
        plane = None if hidden is None else hidden[:, head if hidden.shape[1] != 1 else 0]
        of_head = (query[:, head], key[:, head // group], plane, rows, is_causal, softcap)
        if heads == "max":
            # Probabilities are not negative, so zeros are a neutral start for a maximum as for a sum.
            total = torch.maximum(total, _add_columns(total, False, *of_head))
        else:
            total = _add_columns(total, True, *of_head)
    counted = query.shape[2] if rows is None else rows.sum(1, keepdim=True).clamp(min=1)
    divisor = (query.shape[1] if heads == "mean" else 1) * (counted if reduce == "mean" else 1)
    return total.squeeze(1) / divisor


def _add_columns(
    total: Tensor,
    keep: bool,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    is_causal: bool,
    softcap: float,
) -> Tensor:
    """Column sums [B, 1, Tk] of one head, on top of `total` if `keep`.

    query is [B, Tq, D], already scaled, mask [B or 1, Tq or 1, Tk or 1]. `total` is an operand even when its values are
    not wanted: the chain makes a compiler take the blocks one after the other. Left independent (or as a product
    without accumulation, which Inductor turns into a reduction), their sums fuse and keep the weights of all heads alive.
    """
    tokens = query.shape[1]
    block = _block_rows(tokens, key.shape[1])
    for start in range(0, tokens, block) if block is not None else (0,):
        part = slice(start, tokens if block is None else min(start + block, tokens))
        logits = torch.bmm(query[:, part], key.transpose(1, 2))
        seen = mask if mask is None or mask.shape[1] == 1 else mask[:, part]
        weights, factor = _attention.exponentials(
            _attention.adjust(logits, seen, _causal(logits, start) if is_causal else None, softcap)
        )
        if rows is not None:
            factor = torch.where(rows[:, part, None], factor, 0.0)
        # Dividing by the row sums and adding up the rows is one product.
        total = torch.baddbmm(total, factor.transpose(1, 2), weights, beta=1 if keep or start > 0 else 0)
    return total


def _block_rows(tokens: int, keys: int) -> int | None:
    """Query rows a block, or None for all of them; symbolic lengths cannot be cut into a static number of blocks."""
    if not (isinstance(tokens, int) and isinstance(keys, int)) or tokens * keys <= MAX_BLOCK:
        return None
    return max(1, MAX_BLOCK // keys)


def _causal(logits: Tensor, start: int) -> Tensor:
    """Bool [rows, Tk]: query row `start + i` sees keys up to its own index."""
    row = torch.arange(logits.shape[1], device=logits.device)[:, None] + start
    return torch.arange(logits.shape[2], device=logits.device) <= row


attention_received = _library.define(
    "attention_received(Tensor query, Tensor key, Tensor? mask, Tensor? rows, float scale, bool is_causal, "
    "float softcap, str heads, str reduce) -> Tensor",
    reference,
)
