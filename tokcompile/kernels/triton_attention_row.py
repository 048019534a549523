"""tokred::attention_row in Triton: the keys are read once for each of two passes, see `_triton_columns`."""

from __future__ import annotations

from torch import Tensor

from . import _attention, _triton_columns, _triton_tiles
from .attention_row import check


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(
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
    """What the reference computes, with its arguments, results and errors."""
    check(query, key, mask, index, heads)
    hidden = None if mask is None else _attention.four_d(mask)
    places = index[:, None]
    columns = _triton_columns.over_heads(
        query, key, hidden, None, places, scale, is_causal, softcap, heads, sinks, groups=1
    )
    return columns.squeeze(1)
