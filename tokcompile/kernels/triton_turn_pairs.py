"""The Triton part of turn_pairs: a program turns some tokens of all heads of a row, whose angles it computes once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_gather import block, empty
from .turn_pairs import check

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
TILES = [(512, 2, 1), (1024, 2, 1), (1024, 4, 1), (2048, 4, 1), (2048, 8, 1)]
"""Pairs of a tile, warps and stages."""
COORDINATES, IN_A_WORD = 4, 30
"""Which coordinate turns a pair takes two bits. So many pairs are told of by a word, which stays above 0 in 64 bits: a
negative number that does not fit 32 bits is one that Inductor would take to do so."""


def supports(
    x: Tensor,
    here: Tensor,
    there: Tensor,
    frequencies: Tensor,
    start: int,
    neighbours: bool,
    coordinate: Sequence[int] | None = None,
) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del here, there, start, neighbours
    if x.dtype not in DTYPES:
        return f"no kernel turns {x.dtype}"
    if coordinate is not None and max(coordinate, default=0) >= COORDINATES:
        return f"tokens of {max(coordinate) + 1} positions; at most {COORDINATES}"
    return None if frequencies.shape[-1] <= WIDEST else f"{frequencies.shape[-1]} pairs of a head; at most {WIDEST}"


def launch(
    x: Tensor,
    here: Tensor,
    there: Tensor,
    frequencies: Tensor,
    start: int,
    neighbours: bool,
    coordinate: Sequence[int] | None = None,
) -> Tensor:
    """As the reference; contiguous."""
    batch, heads, tokens, width = x.shape
    check(here, there, frequencies, coordinate)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if empty(x.shape):
        return out
    pairs = frequencies.shape[-1]
    of_pairs = block(pairs, WIDEST)
    # Heads that have positions of their own are turned by programs of their own.
    apart = any(each.dim() > 2 and each.shape[1] != 1 for each in (here, there))
    programs = heads if apart else 1
    wrap_triton(_tuned)[lambda meta: (triton.cdiv(tokens, meta["TILE"] // of_pairs), programs, batch)](
        x,
        here,
        there,
        frequencies,
        out,
        *x.stride(),
        *steps(here),
        *steps(there),
        1 if apart else heads,
        heads,
        tokens,
        width,
        pairs,
        start,
        **words(here, there, frequencies, coordinate),
        NEIGHBOURS=neighbours,
        PAIRS=of_pairs,
        REST=block(width - 2 * pairs, WIDEST),
    )
    return out


def steps(positions: Tensor) -> tuple[Any, ...]:
    """Of rows, heads, tokens and coordinates; 0 where one stands for all."""
    positions = positions.unsqueeze(1) if positions.dim() == 2 else positions
    own = [0 if positions.shape[d] == 1 else positions.stride(d) for d in (0, 1)]
    return *own, positions.stride(2), positions.stride(3) if positions.dim() == 4 else 0


def words(here: Tensor, there: Tensor, frequencies: Tensor, coordinate: Sequence[int] | None) -> dict[str, Any]:
    """What `turning` is told beside the tensors, by name."""
    per_row = frequencies.dim() == 2 and frequencies.shape[0] != 1
    several = [each.dim() == 4 for each in (here, there)]
    return {
        "frequencies_row": frequencies.stride(0) if per_row else 0,
        "frequencies_pair": frequencies.stride(-1),
        **_packed(coordinate or ()),
        "HERE": several[0],
        "THERE": several[1],
    }


def _packed(coordinate: Sequence[int]) -> dict[str, int]:
    """The coordinates of all pairs as words by name, which a kernel is given as it is given sizes."""
    found = {}
    for word in range(-(-WIDEST // IN_A_WORD)):
        part = coordinate[word * IN_A_WORD : (word + 1) * IN_A_WORD]
        found[f"c{word}"] = sum(own << 2 * place for place, own in enumerate(part))
    return found


@triton.jit
def turning(
    here, there, frequencies, here_at, there_at, row, token, inside, pair, there_are,
    here_token, here_own, there_token, there_own, frequencies_row, frequencies_pair,
    c0, c1, c2, c3, c4, c5, c6, c7, c8, HERE: tl.constexpr, THERE: tl.constexpr,
):  # fmt: skip
    """Cosines and sines [SIZE, PAIRS] of the turn from one position to another.

    Args:
        here_at, there_at: where the positions of this row and head begin.
        c0 to c8: which coordinate turns each pair, of IN_A_WORD pairs each.
        HERE, THERE: whether tokens have several positions.
    """
    frequency = tl.load(frequencies + row * frequencies_row + pair * frequencies_pair, mask=there_are, other=0)
    frequency = frequency.to(tl.float32)
    own = pair
    if HERE or THERE:
        which = pair // 30
        word = tl.where(which == 0, _wide(c0), tl.where(which == 1, _wide(c1), _wide(c2)))
        word = tl.where(which > 2, tl.where(which == 3, _wide(c3), tl.where(which == 4, _wide(c4), _wide(c5))), word)
        word = tl.where(which > 5, tl.where(which == 6, _wide(c6), tl.where(which == 7, _wide(c7), _wide(c8))), word)
        own = (word >> (2 * (pair % 30))) & 3
    cos_a, sin_a = _waves(here + here_at, token, here_token, own, here_own, inside, there_are, frequency, HERE)
    cos_b, sin_b = _waves(there + there_at, token, there_token, own, there_own, inside, there_are, frequency, THERE)
    return cos_b * cos_a + sin_b * sin_a, sin_b * cos_a - cos_b * sin_a


@triton.jit
def _wide(number):
    return tl.cast(number, tl.int64)


@triton.jit
def _waves(positions, token, step, own, own_step, inside, there_are, frequency, SEVERAL: tl.constexpr):
    """Cosines and sines of positions by frequencies, in float32 as a model rounds them."""
    if SEVERAL:
        both = inside[:, None] & there_are[None, :]
        found = tl.load(positions + token[:, None] * step + own[None, :] * own_step, mask=both, other=0)
    else:
        found = tl.load(positions + token * step, mask=inside, other=0)[:, None]
    angles = found.to(tl.float32) * frequency[None, :]
    return tl.cos(angles), tl.sin(angles)


@triton.jit
def _turn(
    x, here, there, frequencies, out, x_row, x_head, x_token, x_column,
    here_row, here_head, here_token, here_own, there_row, there_head, there_token, there_own,
    each, heads, tokens, width, pairs, start, frequencies_row, frequencies_pair, c0, c1, c2, c3, c4, c5, c6, c7, c8,
    HERE: tl.constexpr, THERE: tl.constexpr, NEIGHBOURS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Tokens of one row, and of one head or of all, turned; what is not turned is copied."""
    SIZE: tl.constexpr = TILE // PAIRS
    row, begin = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = token < tokens
    pair = tl.arange(0, PAIRS).to(tl.int64)
    there_are = pair < pairs
    cos, sin = turning(
        here, there, frequencies, row * here_row + begin * here_head, row * there_row + begin * there_head,
        row, token, inside, pair, there_are, here_token, here_own, there_token, there_own,
        frequencies_row, frequencies_pair, c0, c1, c2, c3, c4, c5, c6, c7, c8, HERE, THERE,
    )  # fmt: skip
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


_tuned = _triton_tiles.autotuned(_turn, ("TILE",), TILES, ("NEIGHBOURS", "PAIRS", "HERE", "THERE"), WIDEST)
