"""The Triton part of turn_pairs: a program turns some tokens of all heads of a row, whose angles it computes once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import wrap_triton
from ._triton_gather import block, empty

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
TILE = 1024


def supports(x: Tensor, here: Tensor, there: Tensor, frequencies: Tensor, start: int, neighbours: bool) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del here, there, start, neighbours
    if x.dtype not in DTYPES:
        return f"no kernel turns {x.dtype}"
    return None if frequencies.shape[-1] <= WIDEST else f"{frequencies.shape[-1]} pairs of a head; at most {WIDEST}"


def launch(x: Tensor, here: Tensor, there: Tensor, frequencies: Tensor, start: int, neighbours: bool) -> Tensor:
    """As the reference; contiguous."""
    batch, heads, tokens, width = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if empty(x.shape):
        return out
    pairs = frequencies.shape[-1]
    of_pairs = block(pairs, WIDEST)
    size = block(tokens, TILE // of_pairs)
    # Heads that have positions of their own are turned by programs of their own.
    apart = any(each.dim() == 3 and each.shape[1] != 1 for each in (here, there))
    per_row = frequencies.dim() == 2 and frequencies.shape[0] != 1
    grid = (triton.cdiv(tokens, size), heads if apart else 1, batch)
    wrap_triton(_turn)[grid](
        x,
        here,
        there,
        frequencies,
        out,
        *x.stride(),
        *_strides(here),
        *_strides(there),
        frequencies.stride(0) if per_row else 0,
        frequencies.stride(-1),
        1 if apart else heads,
        heads,
        tokens,
        width,
        pairs,
        start,
        NEIGHBOURS=neighbours,
        SIZE=size,
        PAIRS=of_pairs,
        REST=block(width - 2 * pairs, WIDEST),
    )
    return out


def _strides(positions: Tensor) -> tuple[Any, Any, Any]:
    """Of rows, heads and tokens; 0 where one stands for all."""
    positions = positions.unsqueeze(1) if positions.dim() == 2 else positions
    own = [0 if positions.shape[d] == 1 else positions.stride(d) for d in (0, 1)]
    return own[0], own[1], positions.stride(2)


@triton.jit
def waves(positions, at, token, step, inside, frequency):
    """Cosines and sines [SIZE, PAIRS] of positions by frequencies, in float32 as a model rounds them."""
    angles = tl.load(positions + at + token * step, mask=inside, other=0).to(tl.float32)[:, None] * frequency[None, :]
    return tl.cos(angles), tl.sin(angles)


@triton.jit
def _turn(
    x,
    here,
    there,
    frequencies,
    out,
    x_row,
    x_head,
    x_token,
    x_column,
    here_row,
    here_head,
    here_token,
    there_row,
    there_head,
    there_token,
    frequencies_row,
    frequencies_pair,
    each,
    heads,
    tokens,
    width,
    pairs,
    start,
    NEIGHBOURS: tl.constexpr,
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    row, begin = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = token < tokens
    pair = tl.arange(0, PAIRS).to(tl.int64)
    there_are = pair < pairs
    frequency = tl.load(frequencies + row * frequencies_row + pair * frequencies_pair, mask=there_are, other=0).to(
        tl.float32
    )
    cos_a, sin_a = waves(here, row * here_row + begin * here_head, token, here_token, inside, frequency)
    cos_b, sin_b = waves(there, row * there_row + begin * there_head, token, there_token, inside, frequency)
    cos = cos_b * cos_a + sin_b * sin_a
    sin = sin_b * cos_a - cos_b * sin_a
    if NEIGHBOURS:
        one = start + 2 * pair
        two = one + 1
    else:
        one = start + pair
        two = one + pairs
    both = inside[:, None] & there_are[None, :]
    for head in range(begin, begin + each):
        from_x = x + row * x_row + head * x_head + token[:, None] * x_token
        into = out + ((row * heads + head) * tokens + token[:, None]) * width
        first = tl.load(from_x + one[None, :] * x_column, mask=both, other=0).to(tl.float32)
        second = tl.load(from_x + two[None, :] * x_column, mask=both, other=0).to(tl.float32)
        tl.store(into + one[None, :], first * cos - second * sin, mask=both)
        tl.store(into + two[None, :], second * cos + first * sin, mask=both)
        for left in range(0, width - 2 * pairs, REST):
            other = left + tl.arange(0, REST).to(tl.int64)
            plain = inside[:, None] & (other < width - 2 * pairs)[None, :]
            other = tl.where(other < start, other, other + 2 * pairs)
            found = tl.load(from_x + other[None, :] * x_column, mask=plain)
            tl.store(into + other[None, :], found, mask=plain)
