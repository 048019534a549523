"""tokred::key_votes in Triton: two passes over the keys, see `_triton_columns`; no value of heads by keys is kept."""

from __future__ import annotations

from torch import Tensor

from . import _triton_columns, _triton_tiles
from .key_votes import candidates, check


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(query: Tensor, key: Tensor, valid: Tensor | None, first: int, last: int) -> Tensor:
    """What the reference computes, with its arguments, result and errors."""
    check(query, key)
    batch, heads, tokens, _ = key.shape
    open_to = candidates(valid, batch, tokens, first, last, key.device)[:, None, None]
    # The queries that share keys are the rows of one head: keys are read once, and votes are sums over rows and heads.
    rows = query.reshape(batch, heads, query.shape[1] // heads, query.shape[2])
    return _triton_columns.over_heads(
        rows, key, open_to, None, None, 1.0, is_causal=False, softcap=0.0, heads="sum", sinks=None, groups=1
    )
