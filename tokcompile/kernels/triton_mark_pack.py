"""The Triton part of mark_pack: a program finds the slots of a few tokens, and writes there what they become.

Each counts for itself what stays before its tokens, in a row of bools that the L2 cache holds: no program waits for
another, so that slots and tokens are one launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles, triton_mark_tokens
from ._triton import wrap_triton
from ._triton_gather import block, check_count
from ._triton_tiles import dot
from .triton_mark_slots import _kinds

ROWS, COLUMNS, FLAGS = 16, 256, 1024
"""Tokens of a program, numbers of a token that it moves at a time, and flags counted at a time."""
NOTHING, GIVEN, MEANS = range(3)


def supports(x: Tensor, runs: Tensor, length: Any, content: Tensor | None, means: bool) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del runs, length, means
    dtypes = [value.dtype for value in (x, content) if value is not None]
    other = next((each for each in dtypes if each not in triton_mark_tokens.DTYPES), None)
    return None if other is None else f"no kernel marks tokens of {other}"


def launch(x: Tensor, runs: Tensor, length: Any, content: Tensor | None, means: bool) -> list[Tensor]:
    """As the reference."""
    batch, tokens, width = x.shape
    slots = torch.empty((batch, length), dtype=torch.int64, device=x.device)
    out = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    if isinstance(length, int) and length == 0:
        return [out, slots]
    check_count(batch * tokens, "tokens")
    columns = max(block(width, COLUMNS), 16)
    tiles = triton.cdiv(tokens, ROWS) + triton.cdiv(length, ROWS)
    wrap_triton(_tuned)[lambda meta: (tiles * triton.cdiv(width, meta["EACH"] * columns), batch)](
        x,
        runs,
        x if content is None else content,
        slots,
        out,
        *x.stride(),
        *runs.stride(),
        *triton_mark_tokens.content_strides(x if content is None else content),
        tokens,
        length,
        width,
        CONTENT=MEANS if means else NOTHING if content is None else GIVEN,
        EXACT=x.dtype == torch.float32,
        ROWS=ROWS,
        COLUMNS=columns,
        FLAGS=FLAGS,
    )
    return [out, slots]


@triton.jit
def _carried(x, flags, first, x_token, x_column, runs_token, column, there, going, ROWS: tl.constexpr):
    """The run that goes on into a tile: the sum of its tokens before the tile, and how many they are."""
    total = there.to(tl.float32) * 0
    many = tl.zeros([], dtype=tl.int32)
    last = first
    while going:
        token = last - ROWS + tl.arange(0, ROWS)
        run = tl.load(flags + token * runs_token, mask=token >= 0, other=0)
        broken = tl.max(tl.where(run != 0, -1, token), 0)
        tail = (token > broken) & (token >= 0)
        at = x + (token * x_token)[:, None] + (column * x_column)[None, :]
        total += tl.sum(tl.load(at, mask=tail[:, None] & there[None, :], other=0).to(tl.float32), 0)
        many += tl.sum(tail.to(tl.int32), 0)
        last -= ROWS
        going = (broken < last) & (last > 0)
    return total, many


# fmt: off
@triton.jit
def _means(
    x, flags, first, x_token, x_column, runs_token, column, there, found, run, kinds, EXACT: tl.constexpr,
    ROWS: tl.constexpr,
):
    # fmt: on
    """Means [ROWS, COLUMNS] of the runs that end in a tile, in the rows of their last tokens."""
    ends = (kinds == 2).to(tl.int32)
    group = tl.cumsum(ends, 0) - ends
    belongs = (ends != 0)[:, None] & (run != 0)[None, :] & (group[:, None] == group[None, :])
    # What is in no run is left out, and not multiplied by 0: it may be infinite.
    inside = tl.where((run != 0)[:, None], found, tl.zeros_like(found))
    # By way of float32: the interpreter makes no bfloat16 of a bool.
    total = dot(belongs.to(tl.float32).to(inside.dtype), inside, EXACT)
    many = tl.sum(belongs.to(tl.int32), 1)
    from_before = tl.sum(((run == 0) & (group == 0)).to(tl.int32), 0) == 0
    going = from_before & (tl.sum(ends, 0) > 0) & (first > 0)
    before, more = _carried(x, flags, first, x_token, x_column, runs_token, column, there, going, ROWS)
    opened = (group == 0) & (ends != 0)
    total += tl.where(opened[:, None], before[None, :], 0.0)
    many += tl.where(opened, more, 0)
    return total / tl.maximum(many, 1).to(tl.float32)[:, None]


# fmt: off
@triton.jit
def _pack(
    x, runs, content, slots, out, x_row, x_token, x_column, runs_row, runs_token, content_row, content_slot,
    content_column, tokens, length, width,
    CONTENT: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAGS: tl.constexpr,
    EACH: tl.constexpr,
):
    # fmt: on
    row = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, EACH * COLUMNS)
    tile, begin = (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across) * (EACH * COLUMNS)
    x += row * x_row
    flags = runs + row * runs_row
    of_tokens = tl.cdiv(tokens, ROWS)
    first = tile * ROWS
    count = tl.zeros([], dtype=tl.int64)
    before = tl.zeros([], dtype=tl.int64)
    for start in range(0, tokens, FLAGS):
        token = start + tl.arange(0, FLAGS).to(tl.int64)
        run = tl.load(flags + token * runs_token, mask=token < tokens, other=0)
        after = tl.load(flags + (token + 1) * runs_token, mask=token + 1 < tokens, other=0)
        stays = (_kinds(run, after, token < tokens) > 0).to(tl.int64)
        count += tl.sum(stays)
        before += tl.sum(tl.where(token < first, stays, 0))
    spare = length - count
    if tile < of_tokens:
        token = first + tl.arange(0, ROWS)
        run = tl.load(flags + token * runs_token, mask=token < tokens, other=0)
        after = tl.load(flags + (token + 1) * runs_token, mask=token + 1 < tokens, other=0)
        kinds = _kinds(run, after, token < tokens)
        slot = spare + before + tl.cumsum((kinds > 0).to(tl.int64), 0) - 1
        lands = (kinds > 0) & (slot >= 0)
        if begin == 0:
            tl.store(slots + row * length + slot, tl.where(kinds == 2, -2 - token, token), mask=lands)
        if CONTENT == 2:
            read = (kinds == 1) | (run != 0)
        else:
            read = kinds == 1
        for step in range(EACH):
            column = (begin + step * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
            there = column < width
            at = x + (token * x_token)[:, None] + (column * x_column)[None, :]
            found = tl.load(at, mask=read[:, None] & there[None, :], other=0)
            if CONTENT == 1:
                at = content + row * content_row + (slot * content_slot)[:, None] + (column * content_column)[None, :]
                made = tl.load(at, mask=(lands & (kinds == 2))[:, None] & there[None, :], other=0)
                found = tl.where((kinds == 2)[:, None], made.to(found.dtype), found)
            if CONTENT == 2:
                made = _means(
                    x, flags, first, x_token, x_column, runs_token, column, there, found, run, kinds, EXACT, ROWS
                )
                found = tl.where((kinds == 2)[:, None], made.to(found.dtype), found)
            into = out + (row * length + slot)[:, None] * width + column[None, :]
            tl.store(into, found, mask=lands[:, None] & there[None, :])
    else:
        slot = (tile - of_tokens) * ROWS + tl.arange(0, ROWS)
        if begin == 0:
            tl.store(slots + row * length + slot, slot * 0 - 1, mask=slot < spare)
        for step in range(EACH):
            column = (begin + step * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
            into = out + (row * length + slot)[:, None] * width + column[None, :]
            nothing = tl.zeros([ROWS, COLUMNS], dtype=out.dtype.element_ty)
            tl.store(into, nothing, mask=(slot < spare)[:, None] & (column < width)[None, :])


# How many times columns are moved by a program, which counts flags once for all of them.
_tuned = _triton_tiles.autotuned(
    _pack, ("EACH",), [(1, 4, 1), (2, 4, 1), (4, 4, 1), (4, 8, 1), (8, 4, 1)], ("CONTENT", "COLUMNS"), 2
)
