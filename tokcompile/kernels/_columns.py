"""Column sums of an attention matrix, block by block: what keys get, without the matrix of all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention

# One block of logits is [B, rows, Tk]. Larger blocks leave the cache and cost memory, smaller ones make long graphs.
MAX_BLOCK = 1 << 22


def over_heads(
    query: Tensor,
    key: Tensor,
    hidden: Tensor | None,
    rows: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    heads: str,
    sinks: Tensor | None,
    groups: int,
) -> Tensor:
    """Column sums of the heads' attention, brought together in groups of neighbouring heads: float32 [B, groups, Tk].

    query is [B, H, Tq, D], key [B, Hkv, Tk, D], hidden four-dimensional; rows, bool [B, Tq], are those that count;
    heads is "mean", "max" or "sum". One head at a time: three-dimensional blocks are all that ever exists.
    """
    count, shared = query.shape[1], query.shape[1] // groups
    sink = _attention.sinks_by_row(sinks, query.shape[0], count)
    query, key = query.to(torch.float32) * scale, key.to(torch.float32)
    totals = []
    for group in range(groups):
        total = query.new_zeros(query.shape[0], 1, key.shape[2])
        for head in range(group * shared, (group + 1) * shared):
            plane = None if hidden is None else hidden[:, head if hidden.shape[1] != 1 else 0]
            own = None if sink is None else sink[:, head, None, None]
            of_head = (query[:, head], key[:, head * key.shape[1] // count], plane, rows, is_causal, softcap, own)
            if heads == "max":
                # Nothing in `total` is negative, so this adds to zeros; but it chains the heads: see _add.
                total = torch.maximum(total, _add(total.clamp(max=0), *of_head))
            else:
                total = _add(total, *of_head)
        totals.append(total)
    return torch.cat(totals, 1) / (shared if heads == "mean" else 1)


def _add(
    total: Tensor,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    rows: Tensor | None,
    is_causal: bool,
    softcap: float,
    sink: Tensor | None,
) -> Tensor:
    """Add one head's column sums to total [B, 1, Tk].

    query is [B, Tq, D], already scaled, mask [B or 1, Tq or 1, Tk or 1]. Accumulating chains the blocks, so that a
    compiler takes one after the other. Of separate products Inductor makes reductions, fuses these over all heads and
    so keeps the weights of all heads alive.
    """
    tokens = query.shape[1]
    block = _block_rows(tokens, key.shape[1])
    for start in range(0, tokens, block) if block is not None else (0,):
        part = slice(start, tokens if block is None else min(start + block, tokens))
        logits = torch.bmm(query[:, part], key.transpose(1, 2))
        seen = mask if mask is None or mask.shape[1] == 1 else mask[:, part]
        weights, factor = _attention.exponentials(
            _attention.adjust(logits, seen, _causal(logits, start) if is_causal else None, softcap), sink
        )
        if rows is not None:
            factor = torch.where(rows[:, part, None], factor, 0.0)
        # Dividing by the row sums and adding up the rows is one product.
        total = torch.baddbmm(total, factor.transpose(1, 2), weights)
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
