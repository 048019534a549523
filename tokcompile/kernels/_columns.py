"""Column sums of an attention matrix, block by block: what keys get, without the matrix of all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention

# One block of logits is [B, rows, Tk]. Larger blocks leave the cache and cost memory, smaller ones make long graphs.
MAX_BLOCK = 1 << 22


def add(
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
