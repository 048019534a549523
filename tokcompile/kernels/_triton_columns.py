"""Column sums of an attention matrix in Triton: what keys get, in two passes over tiles of logits.

The first pass finds the peak of each query row and the sum of its exponentials, as flash attention does (Dao et al.
2022, Algorithm 1); the second goes key by key, makes the logits again and adds up the probabilities of all query rows.
Nothing of N x N exists: beside the result there are four numbers a row and head, and one a key and head. Of very few
rows logits are kept, where they are less than the keys: then these are read once.

Both passes can be split, over keys and over rows, where a grid is too short to fill a GPU; parts are brought together
in a fixed order. There are no atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import _attention, _triton_tiles
from . import _triton_column_passes as passes
from ._triton import wrap_triton

FEW_ROWS = 64
"""So many query rows or fewer, as of a window, are one tile; the keys are then cut into parts for the first pass."""
ALL_ROWS, MARKED_ROWS, PLACED_ROWS = range(3)
"""How rows are listed: `rows_at` of the passes reads it."""

_KEY = ("DEPTH", "MASK", "LISTED", "CAUSAL", "CAPPED")
_row_parts_of_many = _triton_tiles.autotuned_by_dtype(
    passes.row_parts,
    ("TALL", "WIDE"),
    [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)],
    [(128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (16, 64, 4, 2), (32, 16, 4, 2), (16, 32, 4, 1)],
    _KEY,
)
_row_parts_of_few = _triton_tiles.autotuned_by_dtype(
    passes.row_parts,
    ("WIDE",),
    [(128, 4, 3), (64, 4, 4), (64, 4, 2), (32, 4, 2)],
    [(64, 4, 4), (64, 4, 2), (32, 4, 2), (16, 4, 2)],
    (*_KEY, "TALL"),
)
_column_parts_of_many = _triton_tiles.autotuned_by_dtype(
    passes.column_parts,
    ("WIDE", "TALL"),
    [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)],
    [(128, 32, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 16, 4, 2), (32, 16, 4, 2), (16, 32, 4, 1)],
    _KEY,
)
_column_parts_of_few = _triton_tiles.autotuned_by_dtype(
    passes.column_parts,
    ("WIDE",),
    [(128, 4, 1), (64, 4, 1), (32, 4, 1)],
    [(64, 4, 1), (32, 4, 1), (16, 4, 1)],
    (*_KEY, "TALL"),
)
_VECTOR = 64 if _triton_tiles.INTERPRETED else 256


@dataclass(frozen=True, eq=False)
class _Site:
    """One attention as the kernels take it.

    Attributes:
        mask: expanded to [B, H, Tq, Tk], or any tensor that is not read.
        rows: what lists the rows, or any tensor that is not read.
        looked: entries of that list, or all query rows.
        scale, softcap: floats.
        flags: constants of the kernels.
    """

    query: Tensor
    key: Tensor
    mask: Tensor
    rows: Tensor
    looked: int
    scale: float
    softcap: float
    flags: Mapping[str, int | bool]

    @property
    def planes(self) -> int:
        """Heads of queries, over all batch rows."""
        return self.query.shape[0] * self.query.shape[1]

    @property
    def tall(self) -> int | None:
        """Rows of a tile where one tile has them all; None where there are several, of the size that is fastest."""
        most = min(FEW_ROWS, _triton_tiles.most_rows(self.flags["DEEP"], bool(self.flags["EXACT"])))
        return _triton_tiles.power_of_2(self.looked, 16) if self.looked <= most else None

    def launch(
        self,
        many: Mapping[bool, Any],
        few: Mapping[bool, Any],
        cut: str,
        parts: tuple[int, int],
        *between: Tensor,
        **flags: bool,
    ) -> None:
        """Run one of two kernels whose grid is the tiles along `cut`, for each part, of each head.

        Args:
            many, few: where there are several tiles of rows, and where one has them all; by whether they are EXACT.
        """
        query, key, mask, tall = self.query, self.key, self.mask, self.tall
        length = self.looked if cut == "TALL" else key.shape[2]
        sizes = {} if tall is None else {"TALL": tall}
        heads = query.shape[1]
        wrap_triton((many if tall is None else few)[bool(self.flags["EXACT"])])[
            lambda meta: (triton.cdiv(length, {**meta, **sizes}[cut]) * parts[0] * self.planes,)
        ](
            query, key, mask, self.rows, *between, *query.stride(), *key.stride(), *mask.stride(),
            heads, heads // key.shape[1], self.looked, key.shape[2], *parts, self.scale, self.softcap,
            **self.flags, **sizes, **flags,
        )  # fmt: skip


def over_heads(
    query: Tensor,
    key: Tensor,
    hidden: Tensor | None,
    rows: Tensor | None,
    places: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    heads: str,
    sinks: Tensor | None,
    groups: int,
    known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """What `_columns.over_heads` computes, float32 [B, groups, Tk]; arguments as there.

    Args:
        known: peaks and shares of the rows, float32 [B, H, Tq] and contiguous, as `passes.rows_joined` makes them: the
            first pass is left out. None: they are not known.
        places: int64 [B, W], the query rows that count, -1 for none; causality and the mask go by these. `rows` is
            None then. None: all rows count, or those of `rows`.
    """
    site = _site(query, key, hidden, rows, places, scale, is_causal, softcap)
    few = site.tall is not None
    kept = _room(site) if few and known is None and _is_worth_keeping(site) else None
    peaks, shares = _shares(site, sinks, kept) if known is None else known
    (batch, count), keys = query.shape[:2], key.shape[2]
    parts = (1, site.looked) if few else _triton_tiles.parts_of(site.planes * triton.cdiv(keys, 64), site.looked)
    received = torch.empty((batch, count, parts[0], keys), dtype=torch.float32, device=query.device)
    if kept is None:
        site.launch(_column_parts_of_many, _column_parts_of_few, "WIDE", parts, peaks, shares, received, FEW=few)
    else:
        wrap_triton(passes.columns_of_kept)[(site.planes, triton.cdiv(keys, _VECTOR))](
            kept, site.rows, peaks, shares, received, count, site.looked, keys,
            LISTED=site.flags["LISTED"], CAUSAL=is_causal, SIZE=_VECTOR,
        )  # fmt: skip
    out, shared = torch.empty((batch, groups, keys), dtype=torch.float32, device=query.device), count // groups
    wrap_triton(passes.heads_joined)[(batch * groups, triton.cdiv(keys, _VECTOR))](
        received, out, keys, shared, parts[0], 1 / shared if heads == "mean" else 1.0, MAX=heads == "max", SIZE=_VECTOR
    )
    return out


def _site(
    query: Tensor,
    key: Tensor,
    hidden: Tensor | None,
    rows: Tensor | None,
    places: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
) -> _Site:
    (batch, count, tokens, depth), keys = query.shape, key.shape[2]
    listed, chosen = list_of(rows, places)
    if hidden is not None and listed == ALL_ROWS:
        hidden = _triton_tiles.in_wide_rows(hidden)
    flags = {
        "DEPTH": depth,
        "DEEP": _triton_tiles.width(depth),
        "MASK": _triton_tiles.mask_kind(hidden),
        "LISTED": listed,
        "CAUSAL": is_causal,
        "CAPPED": softcap > 0,
        "EXACT": query.dtype == torch.float32,
    }
    return _Site(
        query,
        key,
        query if hidden is None else hidden.expand(batch, count, tokens, keys),
        query if chosen is None else chosen,
        tokens if places is None else places.shape[1],
        scale,
        softcap,
        flags,
    )


def list_of(rows: Tensor | None, places: Tensor | None) -> tuple[int, Tensor | None]:
    """How rows are listed, and their list: it is small, and made dense."""
    if places is not None:
        return PLACED_ROWS, places.contiguous()
    return (ALL_ROWS, None) if rows is None else (MARKED_ROWS, rows.contiguous())


def _is_worth_keeping(site: _Site) -> bool:
    """Whether writing logits, and reading them again, moves less than reading the keys a second time."""
    return 12 * site.query.shape[1] * site.looked <= site.key.shape[1] * site.key.shape[3] * site.key.dtype.itemsize


def _room(site: _Site) -> Tensor:
    """Memory for the logits of few rows, float32 [B, H, rows, keys]."""
    shape = (*site.query.shape[:2], site.looked, site.key.shape[2])
    return torch.empty(shape, dtype=torch.float32, device=site.query.device)


def _shares(site: _Site, sinks: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Peaks and shares of all rows, float32 [B, H, rows] each; `passes.rows_joined` says what they are."""
    query, looked = site.query, site.looked
    batch, count = query.shape[:2]
    parts = _triton_tiles.parts_of(site.planes * triton.cdiv(looked, site.tall or 64), site.key.shape[2])
    peaks, totals = (
        torch.empty((batch, count, parts[0], looked), dtype=torch.float32, device=query.device) for _ in range(2)
    )
    room = peaks if kept is None else kept
    site.launch(_row_parts_of_many, _row_parts_of_few, "TALL", parts, peaks, totals, room, KEPT=kept is not None)
    sink = _attention.sinks_by_row(sinks, batch, count)
    by = query if sink is None else sink
    peak, share = (torch.empty((batch, count, looked), dtype=torch.float32, device=query.device) for _ in range(2))
    wrap_triton(passes.rows_joined)[(site.planes, triton.cdiv(looked, _VECTOR))](
        peaks, totals, by, site.rows, peak, share, *by.stride()[:2], count, looked, parts[0],
        PARTS=_triton_tiles.power_of_2(parts[0]), SINKS=sink is not None, LISTED=site.flags["LISTED"], SIZE=_VECTOR,
    )  # fmt: skip
    return peak, share
