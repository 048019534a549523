"""The passes of Triton that sum up the columns of an attention matrix; `_triton_columns` says what for, and calls them.

TALL rows by WIDE keys make a tile; heads of DEPTH numbers are padded to DEEP, a power of two. MASK is as in
`_triton_tiles.masked`, LISTED as in `rows_at`. Rows or keys are cut into `parts` of `part` each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_tiles import LOWEST, added, base2, dot, masked, reach, tile


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
    peak, total, q, key, mask, kept, at, counted, begin, end, keys, k_token, k_depth, m_query, m_key, scale, softcap,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr, EXACT: tl.constexpr, KEPT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add keys begin to end to the running peaks and sums of a tile of rows; EDGE where some rows see some only."""
    for start in range(begin, end, WIDE):
        logits = tile(
            q, key, mask, at, counted, start, end, keys, k_token, k_depth, m_query, m_key, scale, softcap,
            WIDE, DEPTH, DEEP, MASK, CAUSAL, CAPPED, EXACT, EDGE,
        )  # fmt: skip
        if KEPT:
            column = start + tl.arange(0, WIDE)
            tl.store(kept[:, None] + column[None, :], logits, mask=counted[:, None] & (column < end)[None, :])
        higher = tl.maximum(peak, tl.max(logits, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(logits - higher[:, None]), 1)
        peak = higher
    return peak, total


@triton.jit
def row_parts(
    query, key, mask, rows, peaks, totals, kept,
    q_batch, q_head, q_token, q_depth, k_batch, k_head, k_token, k_depth, m_batch, m_head, m_query, m_key,
    heads, group, count, keys, parts, part, scale, softcap,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, MASK: tl.constexpr,
    LISTED: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Peaks and sums of exponentials, base 2, of `count` rows over each part of the keys: [B, H, parts, count].

    KEPT: logits are written too, [B, H, count, keys], those that a row may see.
    """
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
    kept_at = kept + (plane.to(tl.int64) * count + index) * keys
    begin = cut * part
    whole, end = reach(at, counted, begin, tl.minimum(begin + part, keys), keys, WIDE, CAUSAL)
    peak, total = tl.full([TALL], LOWEST, tl.float32), tl.zeros([TALL], tl.float32)
    peak, total = _absorb(
        peak, total, q, key, mask, kept_at, at, counted, begin, whole, keys, k_token, k_depth, m_query, m_key,
        scale, softcap, WIDE, DEPTH, DEEP, MASK, CAUSAL, CAPPED, EXACT, KEPT, False,
    )  # fmt: skip
    peak, total = _absorb(
        peak, total, q, key, mask, kept_at, at, counted, whole, end, keys, k_token, k_depth, m_query, m_key,
        scale, softcap, WIDE, DEPTH, DEEP, MASK, CAUSAL, CAPPED, EXACT, KEPT, True,
    )  # fmt: skip
    out = (plane.to(tl.int64) * parts + cut) * count + index
    tl.store(peaks + out, peak, mask=index < count)
    tl.store(totals + out, total, mask=index < count)


@triton.jit
def rows_joined(
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
def column_parts(
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
def columns_of_kept(
    kept, rows, peaks, shares, out, heads, count, keys, LISTED: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr
):  # fmt: skip
    """Probability mass that each key gets from few rows, of the logits that were kept: [B, H, keys]."""
    plane, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    received = tl.zeros([SIZE], tl.float32)
    for index in range(0, count):
        at, counted = rows_at(rows, plane // heads, index, count, count, LISTED)
        end = tl.where(counted, keys, 0)
        if CAUSAL:
            # Beyond what the row sees nothing was written.
            end = tl.minimum(end, at + 1)
        logits = tl.load(kept + (plane * count + index) * keys + column, mask=column < end, other=float("-inf"))
        row = plane * count + index
        received += tl.exp2(logits - tl.load(peaks + row)) * tl.load(shares + row)
    tl.store(out + plane * keys + column, received, mask=column < keys)


@triton.jit
def heads_joined(parts_of, out, keys, shared, parts, factor, MAX: tl.constexpr, SIZE: tl.constexpr):
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
