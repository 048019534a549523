"""received_by_sums in Triton: the second of the passes over tiles of logits, see `_triton_columns`."""

from __future__ import annotations

from torch import Tensor

from . import _triton_columns, _triton_tiles
from .attention_received import reduced
from .received_by_sums import check


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(
    query: Tensor,
    key: Tensor,
    sums: Tensor,
    rows: Tensor | None,
    scale: float,
    is_causal: bool,
    heads: str,
    reduce: str,
) -> Tensor:
    """What the reference computes, with its arguments, results and errors; memory is linear in tokens."""
    check(query, sums)

    def columns(hidden: Tensor | None) -> Tensor:
        return _triton_columns.over_heads(
            query, key, hidden, rows, None, scale, is_causal, 0.0, heads, None, groups=1, sums=sums
        )

    return reduced(columns, query, key, None, rows, heads, reduce)
