"""received_by_sums in Triton: the second of the passes over tiles of logits, see `_triton_columns`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _triton_columns, _triton_tiles
from .attention_received import reduced
from .received_by_sums import check, split


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
    mask: Tensor | None = None,
    softcap: float = 0.0,
    peaks: Tensor | None = None,
) -> Tensor:
    """What the reference computes, with its arguments, results and errors; memory is linear in tokens."""
    check(query, sums, peaks)

    def columns(hidden: Tensor | None) -> Tensor:
        return _triton_columns.over_heads(
            *(query, key, hidden, rows, None, scale, is_causal, softcap, heads, None),
            groups=1,
            known=_shares(sums, peaks),
        )

    return reduced(columns, query, key, mask, rows, heads, reduce)


def _shares(sums: Tensor, peaks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Peaks and shares of rows, as the first pass would find them."""
    seen = torch.isfinite(sums)
    less, share = split(sums, peaks)
    return torch.where(seen, less, torch.inf).contiguous(), torch.where(seen, share, 0.0).contiguous()
