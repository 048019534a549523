"""Attention of few queries to many keys in Triton, the keys cut into parts: flash decoding (Dao et al. 2023).

Queries that share a head of keys are the rows of one tile, so that each key and value is read once for all of them. The
keys may be listed: then only those are read, where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention, _triton_tiles
from ._triton import wrap_triton
from ._triton_tiles import LOWEST, absorb, added, base2, dot, masked


@triton.jit
def _part(
    query, key, value, mask, index, sinks, out, peaks, totals,
    q_batch, q_head, q_token, q_depth, k_batch, k_head, k_token, k_depth, v_batch, v_head, v_token, v_depth,
    m_batch, m_head, m_query, m_key, i_batch, i_head, s_batch, s_head,
    planes, group, shared, per_mask, queries, keys, parts, part, scale, softcap,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, OUT: tl.constexpr,
    BROAD: tl.constexpr, MASK: tl.constexpr, LISTED: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attention of `group` heads x `queries` rows to one part of the keys of one of `planes` heads.

    WHOLE: there is one part, and its result is what is asked for. Else the result of each part is left as it is summed
    up, with the peak and the sum of each row's exponentials.
    """
    rows = group * queries
    tiles, pid = tl.cdiv(rows, TALL), tl.program_id(0)
    which, cut, plane = pid % tiles, pid // tiles % parts, pid // tiles // parts
    b, p = (plane // planes).to(tl.int64), (plane % planes).to(tl.int64)
    row, deep, broad = which * TALL + tl.arange(0, TALL), tl.arange(0, DEEP), tl.arange(0, BROAD)
    real = row < rows
    head, token = p * group + row // queries, (row % queries).to(tl.int64)
    own = query + b * q_batch + (head * q_head + token * q_token)[:, None] + deep[None, :] * q_depth
    q = tl.load(own, mask=real[:, None] & (deep < DEPTH)[None, :], other=0.0)
    key += b * k_batch + p // shared * k_head
    value += b * v_batch + p // shared * v_head
    mask_row = mask + b * m_batch + head // per_mask * m_head + token * m_query
    peak, total = tl.full([TALL], LOWEST, tl.float32), tl.zeros([TALL], tl.float32)
    if SINKS:
        # A sink is a key without a value, of the first part.
        sink = added(tl.load(sinks + b * s_batch + head * s_head, mask=real, other=float("-inf")))
        sink = tl.where(cut == 0, sink, float("-inf"))
        peak = tl.maximum(peak, sink)
        total = tl.exp2(sink - peak)
    result = tl.zeros([TALL, BROAD], tl.float32)
    end = tl.minimum(cut * part + part, keys)
    for start in range(cut * part, end, WIDE):
        place = start + tl.arange(0, WIDE)
        there = place < end
        column = place.to(tl.int64)
        if LISTED:
            column = tl.load(index + b * i_batch + p * i_head + place, mask=there, other=0)
        k_at = key + column[None, :] * k_token + deep[:, None] * k_depth
        k = tl.load(k_at, mask=there[None, :] & (deep < DEPTH)[:, None], other=0.0)
        logits = base2(dot(q, k, EXACT), scale, softcap, CAPPED)
        if MASK != 0:
            logits = masked(logits, mask_row[:, None] + column[None, :] * m_key, real[:, None] & there[None, :], MASK)
        logits = tl.where(there[None, :], logits, float("-inf"))
        v_at = value + column[:, None] * v_token + broad[None, :] * v_depth
        v = tl.load(v_at, mask=there[:, None] & (broad < OUT)[None, :], other=0.0)
        peak, total, result = absorb(peak, total, result, logits, v)
    if WHOLE:
        result = result / tl.where(total > 0, total, 1.0)[:, None]
    at = (plane.to(tl.int64) * parts + cut) * rows + row
    spot = out + at[:, None] * OUT + broad[None, :]
    tl.store(spot, result.to(out.dtype.element_ty), mask=real[:, None] & (broad < OUT)[None, :])
    if not WHOLE:
        tl.store(peaks + at, peak, mask=real)
        tl.store(totals + at, total, mask=real)


@triton.jit
def _joined(
    results, peaks, totals, out, rows, parts, PARTS: tl.constexpr, OUT: tl.constexpr, BROAD: tl.constexpr
):  # fmt: skip
    """Bring the parts of one row together, in one order."""
    at = tl.program_id(0).to(tl.int64)
    plane, row = at // rows, at % rows
    cut, broad = tl.arange(0, PARTS), tl.arange(0, BROAD)
    spot = (plane * parts + cut) * rows + row
    each = tl.load(peaks + spot, mask=cut < parts, other=LOWEST)
    share = tl.exp2(each - tl.max(each, 0))
    total = tl.sum(tl.load(totals + spot, mask=cut < parts, other=0.0) * share, 0)
    inside = (cut < parts)[:, None] & (broad < OUT)[None, :]
    result = tl.load(results + spot[:, None] * OUT + broad[None, :], mask=inside, other=0.0)
    result = tl.sum(result * share[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + at * OUT + broad, result.to(out.dtype.element_ty), mask=broad < OUT)


_tuned = _triton_tiles.autotuned_by_dtype(
    _part,
    ("WIDE",),
    [(64, 4, 3), (128, 4, 2), (128, 8, 3), (32, 4, 3), (16, 4, 3)],
    [(64, 4, 3), (32, 4, 3), (32, 8, 2), (16, 4, 3), (16, 4, 2), (16, 4, 1)],
    ("DEPTH", "OUT", "TALL", "MASK", "LISTED", "CAPPED"),
)


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    index: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """softmax(cap(query @ key^T * scale) + mask) @ value, over all keys or those that are listed.

    Args:
        query: [B, H, Tq, D].
        key, value: [B, Hkv, N, D] and [B, Hkv, N, Dv].
        mask: bool or float [B or 1, G, Tq or 1, N], H a multiple of G; None.
        index: int64 [B, P, k] within [0, N), P = 1, Hkv or a multiple of it that H is a multiple of; None: all keys.
        scale, softcap, sinks: as for `attend`.

    Returns:
        [B, H, Tq, Dv], contiguous, of the dtype of `value`.
    """
    batch, heads, queries, depth = query.shape
    planes = key.shape[1] if index is None else max(key.shape[1], index.shape[1])
    keys = key.shape[2] if index is None else index.shape[2]
    width, group = value.shape[3], heads // planes
    rows = group * queries
    exact, deep = query.dtype == torch.float32, _triton_tiles.width(depth)
    tall = min(_triton_tiles.most_rows(max(deep, width), exact), _triton_tiles.power_of_2(rows, 16))
    grid = batch * planes * triton.cdiv(rows, tall)
    parts, part = _triton_tiles.parts_of(grid, keys)
    out = torch.empty((batch, heads, queries, width), dtype=value.dtype, device=value.device)
    results, peaks, totals = out, out, out
    if parts > 1:
        results = torch.empty((batch, planes, parts, rows, width), dtype=torch.float32, device=query.device)
        peaks, totals = (
            torch.empty((batch, planes, parts, rows), dtype=torch.float32, device=query.device) for _ in range(2)
        )
    sink = _attention.sinks_by_row(sinks, batch, heads)
    by, listed = query if sink is None else sink, query if index is None else index.contiguous()
    hidden = query if mask is None else mask.expand(batch, -1, queries, key.shape[2])
    broad = _triton_tiles.width(width)
    wrap_triton(_tuned[exact])[(grid * parts,)](
        query, key, value, hidden, listed, by, results, peaks, totals,
        *query.stride(), *key.stride(), *value.stride(), *hidden.stride(), listed.stride(0),
        0 if index is None or index.shape[1] == 1 else listed.stride(1), *by.stride()[:2],
        planes, group, planes // key.shape[1], 1 if mask is None else heads // mask.shape[1], queries, keys,
        parts, part, scale, softcap, TALL=tall, DEPTH=depth, DEEP=deep, OUT=width, BROAD=broad,
        MASK=_triton_tiles.mask_kind(mask), LISTED=index is not None, SINKS=sink is not None, CAPPED=softcap > 0,
        EXACT=exact, WHOLE=parts == 1,
    )  # fmt: skip
    if parts > 1:
        wrap_triton(_joined)[(batch * planes * rows,)](
            results, peaks, totals, out, rows, parts, PARTS=_triton_tiles.power_of_2(parts), OUT=width, BROAD=broad
        )
    return out
