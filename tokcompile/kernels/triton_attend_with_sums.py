"""attend_with_sums in Triton: flash attention (Dao et al. 2022, algorithm 1) that hands on the sums of its rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention, _triton_tiles
from ._triton import wrap_triton
from ._triton_tiles import LOWEST, absorb, added, reach, tile
from .attend_with_sums import check


@triton.jit
def _take(
    peak, total, result, q, key, value, mask, at, counted, begin, end, keys,
    k_token, k_depth, v_token, v_depth, m_query, m_key, scale, softcap,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, OUT: tl.constexpr, BROAD: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add keys begin to end to the running peaks, sums and results of rows; EDGE where some rows see some only."""
    broad = tl.arange(0, BROAD)
    for start in range(begin, end, WIDE):
        logits = tile(
            q, key, mask, at, counted, start, end, keys, k_token, k_depth, m_query, m_key, scale, softcap,
            WIDE, DEPTH, DEEP, MASK, CAUSAL, CAPPED, EXACT, EDGE,
        )  # fmt: skip
        column = start + tl.arange(0, WIDE)
        spot = value + column.to(tl.int64)[:, None] * v_token + broad[None, :] * v_depth
        v = tl.load(spot, mask=(column < keys)[:, None] & (broad < OUT)[None, :], other=0.0)
        peak, total, result = absorb(peak, total, result, logits, v)
    return peak, total, result


@triton.jit
def _rows(
    query, key, value, mask, sinks, out, sums, peaks,
    q_batch, q_head, q_token, q_depth, k_batch, k_head, k_token, k_depth, v_batch, v_head, v_token, v_depth,
    m_batch, m_head, m_query, m_key, s_batch, s_head, heads, group, count, keys, scale, softcap,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, OUT: tl.constexpr,
    BROAD: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, SINKS: tl.constexpr, CAPPED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Attention of TALL rows of a head: [B, count, H, OUT], and their sums and peaks, [B, H, count] each."""
    tiles, pid = tl.cdiv(count, TALL), tl.program_id(0)
    which, plane = pid % tiles, (pid // tiles).to(tl.int64)
    if CAUSAL:
        # The last rows see most: they begin first.
        which = tiles - 1 - which
    b, h = plane // heads, plane % heads
    row, deep, broad = which * TALL + tl.arange(0, TALL), tl.arange(0, DEEP), tl.arange(0, BROAD)
    real, at = row < count, row.to(tl.int64)
    spot = query + b * q_batch + h * q_head + at[:, None] * q_token + deep[None, :] * q_depth
    q = tl.load(spot, mask=real[:, None] & (deep < DEPTH)[None, :], other=0.0)
    key += b * k_batch + h // group * k_head
    value += b * v_batch + h // group * v_head
    mask += b * m_batch + h * m_head
    peak, total = tl.full([TALL], LOWEST, tl.float32), tl.zeros([TALL], tl.float32)
    if SINKS:
        # A sink is a key without a value.
        sink = added(tl.load(sinks + b * s_batch + h * s_head))
        peak = tl.maximum(peak, sink)
        total = tl.exp2(sink - peak)
    result = tl.zeros([TALL, BROAD], tl.float32)
    whole, end = reach(row, real, 0, keys, keys, WIDE, CAUSAL)
    peak, total, result = _take(
        peak, total, result, q, key, value, mask, row, real, 0, whole, keys,
        k_token, k_depth, v_token, v_depth, m_query, m_key, scale, softcap,
        WIDE, DEPTH, DEEP, OUT, BROAD, MASK, CAUSAL, CAPPED, EXACT, False,
    )  # fmt: skip
    peak, total, result = _take(
        peak, total, result, q, key, value, mask, row, real, whole, end, keys,
        k_token, k_depth, v_token, v_depth, m_query, m_key, scale, softcap,
        WIDE, DEPTH, DEEP, OUT, BROAD, MASK, CAUSAL, CAPPED, EXACT, True,
    )  # fmt: skip
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    own = out + ((b * count + at) * heads + h)[:, None] * OUT + broad[None, :]
    tl.store(own, (result / total[:, None]).to(out.dtype.element_ty), mask=real[:, None] & (broad < OUT)[None, :])
    tl.store(sums + plane * count + row, tl.where(seen, tl.log(total), float("-inf")), mask=real)
    tl.store(peaks + plane * count + row, peak, mask=real)


_tuned = _triton_tiles.autotuned_by_dtype(
    _rows,
    ("TALL", "WIDE"),
    [
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (128, 128, 8, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (64, 32, 8, 2),
        (32, 32, 4, 1),
    ],
    # Heads of 256 floats leave room for little: the last.
    [(128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 2), (16, 32, 4, 2), (16, 16, 8, 1)],
    ("DEPTH", "OUT", "MASK", "CAUSAL", "CAPPED"),
)


def supports(query: Tensor, key: Tensor, value: Tensor, *others: object) -> str | None:
    """Why these arguments need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key, value)


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the reference computes, with its arguments, results and errors.

    Memory is linear in tokens, but for a mask that `in_wide_rows` copies.
    """
    hidden = check(query, key, value, mask)
    (batch, heads, count, depth), (shared, keys, width) = query.shape, value.shape[1:]
    hidden = query if hidden is None else _triton_tiles.in_wide_rows(hidden).expand(batch, heads, count, keys)
    sink = _attention.sinks_by_row(sinks, batch, heads)
    by = query if sink is None else sink
    exact = query.dtype == torch.float32
    out = torch.empty((batch, count, heads, width), dtype=value.dtype, device=value.device)
    sums, peaks = (torch.empty((batch, heads, count), dtype=torch.float32, device=query.device) for _ in range(2))
    wrap_triton(_tuned[exact])[lambda meta: (triton.cdiv(count, meta["TALL"]) * batch * heads,)](
        query, key, value, hidden, by, out, sums, peaks,
        *query.stride(), *key.stride(), *value.stride(), *hidden.stride(), *by.stride()[:2],
        heads, heads // shared, count, keys, scale, softcap,
        DEPTH=depth, DEEP=_triton_tiles.width(depth), OUT=width, BROAD=_triton_tiles.width(width),
        MASK=_triton_tiles.mask_kind(mask), CAUSAL=is_causal, SINKS=sink is not None, CAPPED=softcap > 0,
        EXACT=exact,
    )  # fmt: skip
    return out, sums, peaks
