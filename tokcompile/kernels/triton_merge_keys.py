"""The Triton part of merge_keys: a program for some of the tokens of a head that stay, over all that go into them.

A merge is a product of [k, T] weights, which exist in registers only, with [T, D] keys: added up in one order, so that
every run gives the same. Tensor cores do it, each float32 as the sum of narrower parts. Blocks of tokens of which none
goes into these are left out, but for their classes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_gather import block

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256


def supports(
    cache: Tensor,
    index: Tensor,
    classes: Tensor,
    weights: Tensor,
    plain: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    neighbours: bool,
) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del neighbours
    for value in (cache, weights, plain, cos, sin):
        if value is not None and value.dtype not in DTYPES:
            return f"no kernel merges {value.dtype}"
    if index.dtype != torch.int64 or classes.dtype != torch.int64:
        return f"index and classes are int64, not {index.dtype} and {classes.dtype}"
    return None if cache.shape[3] <= WIDEST else f"heads of {cache.shape[3]} numbers; at most {WIDEST}"


def launch(
    cache: Tensor,
    index: Tensor,
    classes: Tensor,
    weights: Tensor,
    plain: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    neighbours: bool,
) -> Tensor:
    """As the reference; contiguous."""
    batch, heads, tokens, width = cache.shape
    kept = index.shape[2]
    out = torch.empty((batch, heads, kept, width), dtype=cache.dtype, device=cache.device)
    if isinstance(kept, int) and kept == 0:
        return out
    whole = cache if plain is None else plain
    tables = [cache if table is None else table for table in (cos, sin)]
    columns = max(block(width, WIDEST), 16)
    words: dict[str, Any] = {"out": out, "kept": kept, "heads": heads, "tokens": tokens, "width": width}
    words["turned"] = tables[0].shape[3]
    named = {"cache": cache, "index": index, "classes": classes, "weights": weights, "whole": whole}
    for name, value in (named | dict(zip(("cos", "sin"), tables, strict=True))).items():
        words[name] = value
        words |= {f"{name}_{d}": 0 if value.shape[d] == 1 and d < 2 else value.stride(d) for d in range(value.dim())}
    wrap_triton(_tuned[columns > 128])[lambda meta: (triton.cdiv(kept, meta["SLOTS"]), heads, batch)](
        **words,
        TURN=plain is not None,
        NEIGHBOURS=neighbours,
        COLUMNS=columns,
    )
    return out


@triton.jit
def _merge(
    cache,
    index,
    classes,
    weights,
    whole,
    cos,
    sin,
    out,
    kept,
    heads,
    tokens,
    width,
    turned,
    cache_0,
    cache_1,
    cache_2,
    cache_3,
    index_0,
    index_1,
    index_2,
    classes_0,
    classes_1,
    classes_2,
    weights_0,
    weights_1,
    weights_2,
    whole_0,
    whole_1,
    whole_2,
    whole_3,
    cos_0,
    cos_1,
    cos_2,
    cos_3,
    sin_0,
    sin_1,
    sin_2,
    sin_3,
    TURN: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    here = slot < kept
    if NEIGHBOURS:
        first = column % 2 == 0
        partner = tl.where(first, column + 1, column - 1)
    else:
        first = column < turned // 2
        partner = tl.where(first, column + turned // 2, column - turned // 2)
    sums = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    others = tl.zeros([SLOTS, COLUMNS], dtype=tl.float32)
    total = tl.zeros([SLOTS], dtype=tl.float32)
    count = tl.zeros([SLOTS], dtype=tl.int32)
    for begin in range(0, tokens, TOKENS):
        token = begin + tl.arange(0, TOKENS).to(tl.int64)
        real = token < tokens
        goes = tl.load(classes + row * classes_0 + head * classes_1 + token * classes_2, mask=real, other=0)
        member = (goes[None, :] == slot[:, None] + 1) & here[:, None]
        found = tl.sum(member.to(tl.int32), 1)
        count += found
        if tl.sum(found) > 0:
            weight = tl.load(weights + row * weights_0 + head * weights_1 + token * weights_2, mask=real, other=0)
            weight = tl.maximum(weight.to(tl.float32), 0.0)
            share = tl.where(member, weight[None, :], 0.0)
            total += tl.sum(share, 1)
            # What goes nowhere may hold anything, NaN too.
            used = (real & (goes > 0))[:, None]
            at = whole + row * whole_0 + head * whole_1 + token[:, None] * whole_2
            x = tl.load(at + column[None, :] * whole_3, mask=used & (column < width)[None, :], other=0)
            sums += tl.dot(share, x.to(tl.float32), input_precision="tf32x3")
            if TURN:
                x = tl.load(at + partner[None, :] * whole_3, mask=used & (column < turned)[None, :], other=0)
                others += tl.dot(share, x.to(tl.float32), input_precision="tf32x3")
    inside = here[:, None] & (column < width)[None, :]
    by = tl.where(total > 0, total, 1.0)[:, None]
    means = sums / by
    which = tl.load(index + row * index_0 + head * index_1 + slot * index_2, mask=here, other=0)
    if TURN:
        part = here[:, None] & (column < turned)[None, :]
        at_cos = cos + row * cos_0 + head * cos_1 + which[:, None] * cos_2 + column[None, :] * cos_3
        at_sin = sin + row * sin_0 + head * sin_1 + which[:, None] * sin_2 + column[None, :] * sin_3
        c = tl.where(part, tl.load(at_cos, mask=part, other=0).to(tl.float32), 1.0)
        s = tl.load(at_sin, mask=part, other=0).to(tl.float32)
        means = means * c + tl.where(first[None, :], -others, others) / by * s
    at = cache + row * cache_0 + head * cache_1 + which[:, None] * cache_2 + column[None, :] * cache_3
    own = tl.load(at, mask=inside, other=0)
    several = (count > 1) & (total > 0)
    result = tl.where(several[:, None], means.to(own.dtype), own)
    tl.store(out + ((row * heads + head) * kept + slot[:, None]) * width + column[None, :], result, mask=inside)


_tuned = {
    wide: _triton_tiles.autotuned(_merge, ("SLOTS", "TOKENS"), tiles, ("TURN", "NEIGHBOURS", "COLUMNS"))
    for wide, tiles in {
        False: [(16, 32, 4, 3), (32, 32, 4, 3), (32, 32, 8, 3), (32, 64, 8, 2), (64, 32, 8, 2)],
        True: [(16, 32, 4, 3), (16, 32, 8, 3), (32, 32, 8, 2)],
    }.items()
}
"""By whether heads have more than 128 numbers."""
