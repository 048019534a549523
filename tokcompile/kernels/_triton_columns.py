"""Column sums of an attention matrix in Triton: what keys get, in two passes over tiles of logits.

The first pass finds the peak of each query row and the sum of its exponentials, as flash attention does (Dao et al.
2022, Algorithm 1); the second goes key by key, makes the logits again and adds up the probabilities of all query rows.
Nothing of N x N exists: beside the result there are four numbers a row and head, and one a key and head.

Both passes can be split, over keys and over rows, where a grid is too short to fill a GPU; parts are brought together
in a fixed order. There are no atomics: the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention, _triton_tiles
from ._triton import wrap_triton
from ._triton_tiles import LOWEST, added, base2, dot, masked

FEW_ROWS = 64
"""So many query rows or fewer, as of a window, are one tile; the keys are then cut into parts for the first pass."""


ALL_ROWS, MARKED_ROWS, PLACED_ROWS = range(3)


@triton.jit
def rows_at(rows, b, index, count, end, LISTED: tl.constexpr):
    """Which query each row `index` of batch row b is, and whether it is one that counts, before `end`.

    `rows` has `count` entries a batch row: LISTED 1: bytes, 0 for a row that does not count; 2: the query's index, -1
    for none; 0: not read, all count.
    """
    counted, at = index < end, index
    if LISTED == 1:
        counted = counted & (tl.load(rows + b * count + index, mask=counted, other=0) != 0)
    if LISTED == 2:
        at = tl.load(rows + b * count + index, mask=counted, other=-1).to(tl.int32)
        counted = counted & (at >= 0)
    return at, counted


@triton.jit
def _absorb(
    peak, total, q, key, mask, at, counted, begin, end, keys, k_token, k_depth, m_query, m_key, scale, softcap,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add keys begin to end to the running peaks and sums of a tile of rows; EDGE where some rows see some only."""
    deep = tl.arange(0, DEEP)
    for start in range(begin, end, WIDE):
        column = start + tl.arange(0, WIDE)
        spot = key + column.to(tl.int64)[None, :] * k_token + deep[:, None] * k_depth
        k = tl.load(spot, mask=(deep < DEPTH)[:, None] & (column < keys)[None, :], other=0.0)
        logits = base2(dot(q, k, EXACT), scale, softcap, CAPPED)
        if MASK != 0:
            m_at = mask + at.to(tl.int64)[:, None] * m_query + column.to(tl.int64)[None, :] * m_key
            logits = masked(logits, m_at, counted[:, None] & (column < end)[None, :], MASK)
        if EDGE:
            seen = (column < end)[None, :]
            if CAUSAL:
                seen = seen & (column[None, :] <= at[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    return peak, total


@triton.jit
def _row_parts(
    query, key, mask, rows, peaks, totals,
    q_batch, q_head, q_token, q_depth, k_batch, k_head, k_token, k_depth, m_batch, m_head, m_query, m_key,
    heads, group, count, keys, parts, part, scale, softcap,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, MASK: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Peaks and sums of exponentials, base 2, of `count` rows over each part of the keys: [B, H, parts, count]."""
    tiles = tl.cdiv(count, TALL)
    pid = tl.program_id(0)
    which, cut, plane = pid % tiles, pid // tiles % parts, pid // tiles // parts
    b, h = (plane // heads).to(tl.int64), (plane % heads).to(tl.int64)
    index, deep = which * TALL + tl.arange(0, TALL), tl.arange(0, DEEP)
    at, counted = rows_at(rows, b, index, count, count, LISTED)
    spot = query + b * q_batch + h * q_head + at.to(tl.int64)[:, None] * q_token + deep[None, :] * q_depth
    q = tl.load(spot, mask=counted[:, None] & (deep < DEPTH)[None, :], other=0.0)
    key += b * k_batch + h // group * k_head
    mask += b * m_batch + h * m_head
    begin = cut * part
    end = tl.minimum(begin + part, keys)
    # No row that counts sees past `last`, and all of them see up to `first`.
    last = tl.max(tl.where(counted, at, -1))
    whole = end
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        whole = tl.minimum(end, tl.min(tl.where(counted, at, keys)) + 1)
    end = tl.where(last < 0, begin, tl.maximum(end, begin))
    whole = begin + tl.maximum(tl.minimum(whole, end) - begin, 0) // WIDE * WIDE
    peak, total = tl.full([TALL], LOWEST, tl.float32), tl.zeros([TALL], tl.float32)
    peak, total = _absorb(
        peak, total, q, key, mask, at, counted, begin, whole, keys, k_token, k_depth, m_query, m_key,
        scale, softcap, WIDE, DEPTH, DEEP, MASK, CAUSAL, CAPPED, EXACT, False,
    )  # fmt: skip
    peak, total = _absorb(
        peak, total, q, key, mask, at, counted, whole, end, keys, k_token, k_depth, m_query, m_key,
        scale, softcap, WIDE, DEPTH, DEEP, MASK, CAUSAL, CAPPED, EXACT, True,
    )  # fmt: skip
    out = (plane.to(tl.int64) * parts + cut) * count + index
    tl.store(peaks + out, peak, mask=index < count)
    tl.store(totals + out, total, mask=index < count)


@triton.jit
def _rows_joined(
    peaks, totals, sinks, rows, out_peaks, shares, s_batch, s_head, heads, count, parts,
    PARTS: tl.constexpr, SINKS: tl.constexpr, LISTED: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Bring parts together: of each row its peak, and one over its sum. exp2(logit - peak) * share is a probability.

    A row that does not count, or sees nothing, has the peak inf and the share 0: all its probabilities are 0.
    """
    plane, index, cut = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE), tl.arange(0, PARTS)
    b = plane // heads
    _, counted = rows_at(rows, b, index, count, count, LISTED)
    inside = (cut < parts)[:, None] & (index < count)[None, :]
    spot = (plane * parts + cut)[:, None] * count + index[None, :]
    each = tl.load(peaks + spot, mask=inside, other=LOWEST)
    peak = tl.max(each, 0)
    if SINKS:
        sink = added(tl.load(sinks + b * s_batch + plane % heads * s_head))
        peak = tl.maximum(peak, sink)
    total = tl.sum(tl.load(totals + spot, mask=inside, other=0.0) * tl.exp2(each - peak[None, :]), 0)
    seen = counted & (total > 0)
    if SINKS:
        total += tl.exp2(sink - peak)
    out = plane * count + index
    tl.store(out_peaks + out, tl.where(seen, peak, float("inf")), mask=index < count)
    tl.store(shares + out, tl.where(seen, 1 / tl.where(seen, total, 1.0), 0.0), mask=index < count)


@triton.jit
def _spread(
    received, k, query, mask, rows, peaks, shares, b, plane, column, inside, begin, end,
    q_token, q_depth, m_query, m_key, count, scale, softcap,
    TALL: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, MASK: tl.constexpr,
    LISTED: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add what rows begin to end give to each key of a tile; EDGE where some see the keys up to their own only."""
    deep = tl.arange(0, DEEP)
    for start in range(begin, end, TALL):
        index = start + tl.arange(0, TALL)
        at, counted = rows_at(rows, b, index, count, end, LISTED)
        alive = True
        if LISTED == 1:
            alive = tl.max(counted.to(tl.int32)) > 0
        if alive:
            spot = query + at.to(tl.int64)[None, :] * q_token + deep[:, None] * q_depth
            q = tl.load(spot, mask=counted[None, :] & (deep < DEPTH)[:, None], other=0.0)
            peak = tl.load(peaks + plane * count + index, mask=counted, other=float("inf"))
            share = tl.load(shares + plane * count + index, mask=counted, other=0.0)
            logits = base2(dot(k, q, EXACT), scale, softcap, CAPPED)
            if MASK != 0:
                m_at = mask + at.to(tl.int64)[None, :] * m_query + column.to(tl.int64)[:, None] * m_key
                logits = masked(logits, m_at, counted[None, :] & inside[:, None], MASK)
            if EDGE:
                logits = tl.where(column[:, None] <= at[None, :], logits, float("-inf"))
            received += tl.sum(tl.exp2(logits - peak[None, :]) * share[None, :], 1)
    return received


@triton.jit
def _column_parts(
    query, key, mask, rows, peaks, shares, out,
    q_batch, q_head, q_token, q_depth, k_batch, k_head, k_token, k_depth, m_batch, m_head, m_query, m_key,
    heads, group, count, keys, parts, part, scale, softcap,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, MASK: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Probability mass that each key gets from each part of the rows: [B, H, parts, keys]."""
    tiles, pid = tl.cdiv(keys, WIDE), tl.program_id(0)
    if FEW:
        # Heads that share keys are neighbours, so that a tile of keys is read once.
        planes = tl.num_programs(0) // tiles
        plane, which, cut = pid % planes, pid // planes, 0
    else:
        which, cut, plane = pid % tiles, pid // tiles % parts, pid // tiles // parts
    plane = plane.to(tl.int64)
    b, h = plane // heads, plane % heads
    column, deep = which * WIDE + tl.arange(0, WIDE), tl.arange(0, DEEP)
    inside = column < keys
    spot = key + b * k_batch + h // group * k_head + column.to(tl.int64)[:, None] * k_token + deep[None, :] * k_depth
    k = tl.load(spot, mask=inside[:, None] & (deep < DEPTH)[None, :], other=0.0)
    query += b * q_batch + h * q_head
    mask += b * m_batch + h * m_head
    begin = cut * part
    end = tl.minimum(begin + part, count)
    edge = begin
    if CAUSAL and LISTED == 2:
        edge = end
    elif CAUSAL:
        # Rows before the tile's first key see none of it, rows from its last key on see all.
        begin = tl.minimum(tl.maximum(begin, which * WIDE // TALL * TALL), end)
        edge = tl.maximum(tl.minimum(tl.cdiv(which * WIDE + WIDE - 1, TALL) * TALL, end), begin)
    received = tl.zeros([WIDE], tl.float32)
    if CAUSAL:
        received = _spread(
            received, k, query, mask, rows, peaks, shares, b, plane, column, inside, begin, edge,
            q_token, q_depth, m_query, m_key, count, scale, softcap,
            TALL, DEPTH, DEEP, MASK, LISTED, CAPPED, EXACT, True,
        )  # fmt: skip
    received = _spread(
        received, k, query, mask, rows, peaks, shares, b, plane, column, inside, edge, end,
        q_token, q_depth, m_query, m_key, count, scale, softcap,
        TALL, DEPTH, DEEP, MASK, LISTED, CAPPED, EXACT, False,
    )  # fmt: skip
    tl.store(out + (plane * parts + cut) * keys + column, received, mask=inside)


@triton.jit
def _heads_joined(parts_of, out, keys, shared, parts, factor, MAX: tl.constexpr, SIZE: tl.constexpr):
    """Sum parts, then sum or maximise `shared` neighbouring heads, in order: [B, groups, keys]."""
    plane, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < keys
    total = tl.zeros([SIZE], tl.float32)
    for head in range(shared):
        own = tl.zeros([SIZE], tl.float32)
        for cut in range(parts):
            spot = ((plane * shared + head) * parts + cut) * keys + column
            own += tl.load(parts_of + spot, mask=inside, other=0.0)
        total = tl.maximum(total, own) if MAX else total + own
    tl.store(out + plane * keys + column, total * factor, mask=inside)


_KEY = ("DEPTH", "MASK", "LISTED", "CAUSAL", "CAPPED")
_row_parts_of_many = _triton_tiles.autotuned(
    _row_parts,
    ("TALL", "WIDE"),
    [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)],
    _KEY,
)
_row_parts_of_few = _triton_tiles.autotuned(
    _row_parts, ("WIDE",), [(128, 4, 3), (64, 4, 4), (64, 4, 2), (32, 4, 2)], (*_KEY, "TALL")
)
_column_parts_of_many = _triton_tiles.autotuned(
    _column_parts,
    ("WIDE", "TALL"),
    [(128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 2)],
    _KEY,
)
_column_parts_of_few = _triton_tiles.autotuned(
    _column_parts, ("WIDE",), [(128, 4, 1), (64, 4, 1), (32, 4, 1)], (*_KEY, "TALL")
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
        return _triton_tiles.power_of_2(self.looked, 16) if self.looked <= FEW_ROWS else None

    def launch(self, many: Any, few: Any, cut: str, parts: tuple[int, int], *between: Tensor, **flags: bool) -> None:
        """Run one of two kernels whose grid is the tiles along `cut`, for each part, of each head."""
        query, key, mask, tall = self.query, self.key, _triton_tiles.as_bytes(self.mask), self.tall
        length = self.looked if cut == "TALL" else key.shape[2]
        sizes = {} if tall is None else {"TALL": tall}
        heads = query.shape[1]
        wrap_triton(many if tall is None else few)[
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
) -> Tensor:
    """What `_columns.over_heads` computes, float32 [B, groups, Tk]; arguments as there.

    Args:
        places: int64 [B, W], the query rows that count, -1 for none; causality and the mask go by these. `rows` is
            None then. None: all rows count, or those of `rows`.
    """
    site = _site(query, key, hidden, rows, places, scale, is_causal, softcap)
    peaks, shares = _shares(site, sinks)
    (batch, count), keys = query.shape[:2], key.shape[2]
    parts = (1, site.looked) if site.tall else _triton_tiles.parts_of(site.planes * triton.cdiv(keys, 64), site.looked)
    received = torch.empty((batch, count, parts[0], keys), dtype=torch.float32, device=query.device)
    few = site.tall is not None
    site.launch(_column_parts_of_many, _column_parts_of_few, "WIDE", parts, peaks, shares, received, FEW=few)
    out, shared = torch.empty((batch, groups, keys), dtype=torch.float32, device=query.device), count // groups
    wrap_triton(_heads_joined)[(batch * groups, triton.cdiv(keys, _VECTOR))](
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
    return (ALL_ROWS, None) if rows is None else (MARKED_ROWS, _triton_tiles.as_bytes(rows.contiguous()))


def _shares(site: _Site, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Peaks and shares of all rows, float32 [B, H, rows] each; `_rows_joined` says what they are."""
    query, looked = site.query, site.looked
    batch, count = query.shape[:2]
    parts = _triton_tiles.parts_of(site.planes * triton.cdiv(looked, site.tall or 64), site.key.shape[2])
    peaks, totals = (
        torch.empty((batch, count, parts[0], looked), dtype=torch.float32, device=query.device) for _ in range(2)
    )
    site.launch(_row_parts_of_many, _row_parts_of_few, "TALL", parts, peaks, totals)
    sink = _attention.sinks_by_row(sinks, batch, count)
    by = query if sink is None else sink
    peak, share = (torch.empty((batch, count, looked), dtype=torch.float32, device=query.device) for _ in range(2))
    wrap_triton(_rows_joined)[(site.planes, triton.cdiv(looked, _VECTOR))](
        peaks, totals, by, site.rows, peak, share, *by.stride()[:2], count, looked, parts[0],
        PARTS=_triton_tiles.power_of_2(parts[0]), SINKS=sink is not None, LISTED=site.flags["LISTED"], SIZE=_VECTOR,
    )  # fmt: skip
    return peak, share
