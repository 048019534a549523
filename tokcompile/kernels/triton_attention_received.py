"""tokred::attention_received in Triton: two passes over tiles of logits, see `_triton_columns`."""

from __future__ import annotations

from torch import Tensor

from . import _triton_columns, _triton_tiles
from .attention_received import reduced


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(
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
    """What the reference computes, with its arguments, results and errors; memory is linear in tokens."""

    def columns(hidden: Tensor | None) -> Tensor:
        return _triton_columns.over_heads(
            query, key, hidden, rows, None, scale, is_causal, softcap, heads, sinks, groups=1
        )

    return reduced(columns, query, key, mask, rows, heads, reduce)
