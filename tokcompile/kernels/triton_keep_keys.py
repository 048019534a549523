"""The Triton part of keep_keys: a program for each head of each row, or for parts of long ones, writes what stays.

It holds keys and classes of a whole row only while it looks for the last one that stays. Counts along the row, of which
every thread would hold as many, are made piece by piece: both together do not fit a GPU's registers for long rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_long_rows as long_rows
from . import _triton_select as select
from ._triton import wrap_triton
from ._triton_select import beside, cut, sortable
from .keep_keys import classes_of

PIECE = 2048
"""Tokens that are counted along at a time."""


def supports(scores: Tensor, valid: Tensor | None, among: Tensor | None, first: int, last: Any, k: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del valid, among, first, last, k
    return select.fault(scores, scores.shape[2])


def launch(scores: Tensor, valid: Tensor | None, among: Tensor | None, first: int, last: Any, k: Any) -> Tensor:
    """As the reference."""
    batch, heads, tokens = scores.shape
    if tokens > select.MOST:
        plain = valid is None and among is None
        classes = None if plain else classes_of(scores, valid, among, first, last).to(torch.int8)
        return long_rows.select(scores, classes, first, last, k, indices=True)
    out = torch.empty((batch, heads, k), dtype=torch.int64, device=scores.device)
    if isinstance(k, int) and k == 0:
        return out
    real, chosen = (scores.select(1, 0) if mask is None else mask for mask in (valid, among))
    block = select.width(tokens)
    wrap_triton(_tuned[block])[(batch * heads,)](
        scores,
        real,
        chosen,
        out,
        scores.stride(0),
        scores.stride(1),
        scores.stride(2),
        real.stride(0),
        real.stride(1),
        chosen.stride(0),
        chosen.stride(1),
        heads,
        tokens,
        first,
        last,
        k,
        VALID=valid is not None,
        AMONG=among is not None,
        BLOCK=block,
        PIECE=min(block, PIECE),
    )
    return out


@triton.jit
def _classes(place, inside, real, among, low, high):
    """2 of tokens that stay, 1 of those that may, 0 of padding, and -1 outside of a row."""
    stays = (real & ((place <= low) | (place >= high))) | (among == 0)
    return tl.where(inside, tl.where(stays, 2, tl.where(real, 1, 0)), -1)


@triton.jit
def _keep(
    scores,
    valid,
    among,
    out,
    scores_row,
    scores_head,
    scores_token,
    valid_row,
    valid_token,
    among_row,
    among_token,
    heads,
    tokens,
    first,
    last,
    k,
    VALID: tl.constexpr,
    AMONG: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    scores += row * scores_row + head * scores_head
    valid += row * valid_row
    among += row * among_row
    out += program * k
    # All loads are here, and none in a function: if what a function returns says where to store, PyTorch takes pointers
    # that it was given for what is written to.
    low, high = tl.zeros([], dtype=tl.int32) + first - 1, tl.zeros([], dtype=tl.int32) + tokens - last
    if VALID:
        # Up to where the first real tokens stand, and from where on the last ones.
        counts = tl.zeros([PIECE], dtype=tl.int32)
        for begin in range(0, tokens, PIECE):
            place = begin + tl.arange(0, PIECE)
            counts += tl.load(valid + place.to(tl.int64) * valid_token, mask=place < tokens, other=0).to(tl.int32)
        total, count = tl.sum(counts), tl.zeros([], dtype=tl.int32)
        low, high = count - 1, count + tokens
        for begin in range(0, tokens, PIECE):
            place = begin + tl.arange(0, PIECE)
            real = tl.load(valid + place.to(tl.int64) * valid_token, mask=place < tokens, other=0) != 0
            rank = count + tl.cumsum(real.to(tl.int32), 0)
            low = tl.maximum(low, tl.max(tl.where(real & (rank <= first), place, -1)))
            high = tl.minimum(high, tl.min(tl.where(real & (rank > total - last), place, tokens)))
            count += tl.sum(real.to(tl.int32))
    all_places = tl.arange(0, BLOCK)
    all_inside = all_places < tokens
    all_tokens = all_places.to(tl.int64)
    all_real, all_among = all_inside, all_inside
    if VALID:
        all_real = tl.load(valid + all_tokens * valid_token, mask=all_inside, other=0) != 0
    if AMONG:
        all_among = tl.load(among + all_tokens * among_token, mask=all_inside, other=1) != 0
    classes = _classes(all_places, all_inside, all_real, all_among, low, high)
    keys = sortable(tl.load(scores + all_tokens * scores_token, mask=all_inside, other=0))
    last_class, last_key, spare = cut(keys, classes, k, 3)
    kept, equals = tl.zeros([], dtype=tl.int32), tl.zeros([], dtype=tl.int32)
    for begin in range(0, tokens, PIECE):
        # What was read before, from a cache.
        place = begin + tl.arange(0, PIECE)
        inside, token = place < tokens, place.to(tl.int64)
        real, chosen = inside, inside
        if VALID:
            real = tl.load(valid + token * valid_token, mask=inside, other=0) != 0
        if AMONG:
            chosen = tl.load(among + token * among_token, mask=inside, other=1) != 0
        key = sortable(tl.load(scores + token * scores_token, mask=inside, other=0))
        above, equal = beside(key, _classes(place, inside, real, chosen, low, high), last_class, last_key)
        keep = above | (equal & (equals + tl.cumsum(equal.to(tl.int32), 0) <= spare))
        slot = kept + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(out + slot, token, mask=keep)
        kept += tl.sum(keep.to(tl.int32))
        equals += tl.sum(equal.to(tl.int32))


_tuned = select.tuned(_keep)
