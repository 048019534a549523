"""Select from rows of any length: launches that each count one digit of all keys, and one that writes what is chosen.

A key has the class of a token and then its score, as `_triton_select` orders them. A row is cut into parts, so that a
few long rows fill a GPU. Counts are of whole numbers and each part has its own: no atomics, and two runs are alike.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_select import sortable

DIGITS = ((26, 512), (17, 512), (8, 512), (0, 256))
"""Of a key of 35 bits, three of them for the class, from the highest: how far it is shifted, how many values it has."""
PART = 4096
"""Tokens that a program reads at a time."""
FEW, MANY, LONG = 8, 32, 65536
"""Parts of a row, and from how many tokens on there are many: each program reads the counts of all parts."""


def select(scores: Tensor, classes: Tensor | None, first: Any, last: Any, k: Any, *, indices: bool) -> Tensor:
    """Choose the k first tokens of each row: those of a higher class, then of a larger score, then of a lower place.

    Args:
        scores: [B, H, T], compared as float32; of tokens of class 0 they do not count.
        classes: [B, T], bool or int8 from 0 to 7; None: the first and the last so many tokens are of class 2, others
            of class 1.
        first, last: static or symbolic.
        k: static or symbolic, at most T.
        indices: whether to list what is chosen, and not to mark it.

    Returns:
        int64 [B, H, k], ascending, or bool [B, H, T].
    """
    batch, heads, tokens = scores.shape
    rows, parts = batch * heads, FEW if tokens <= LONG else MANY
    groups = scores[:, 0] if classes is None else classes
    given = (*scores.stride(), *groups.stride(), heads, tokens, first, last, k)
    fixed = {"CLASSES": classes is not None, "PARTS": parts, "PART": PART}
    before, bins = [scores] * 3, 1
    for shift, values in DIGITS:
        made = [
            torch.empty((rows, parts, values), dtype=torch.int32, device=scores.device),
            torch.empty((rows, 2), dtype=torch.int64, device=scores.device),
            torch.empty((rows, parts), dtype=torch.int32, device=scores.device),
        ]
        words = {"SHIFT": shift, "BINS": values, "BEFORE": bins, **fixed}
        wrap_triton(_tuned_count)[(rows, parts)](scores, groups, *before, *made, *given, **words)
        before, bins = made, values
    out = torch.empty(
        (batch, heads, k if indices else tokens), dtype=torch.int64 if indices else torch.bool, device=scores.device
    )
    words = {"BEFORE": bins, "INDICES": indices, **fixed}
    wrap_triton(_tuned_write)[(rows, parts)](scores, groups, *before, out, *given, **words)
    return out


# PyTorch takes what a function is given for written to, where an address depends on what it returns: so functions are
# given values, and kernels load them.


@triton.jit
def _packed(score, group, inside):
    """Keys, int64: class and score; -1 behind the row."""
    key = sortable(score).to(tl.int64) + 2147483648
    return tl.where(inside, group.to(tl.int64) * 4294967296 + tl.where(group > 0, key, 0), -1)


@triton.jit
def _digit(each, wanted, PARTS: tl.constexpr, BINS: tl.constexpr):
    """The digit of the last one that is chosen, and how many of each part have a higher one, or the same.

    Args:
        each: int32 [PARTS, BINS], how many have each digit.
        wanted: how many of them are to be chosen.
    """
    digit = tl.arange(0, BINS)
    reached = tl.cumsum(tl.sum(each, 0), 0, reverse=True) >= wanted
    own = tl.sum(reached.to(tl.int32)) - 1
    above = tl.sum(tl.where(digit[None, :] > own, each, 0), 1)
    return own, above, tl.sum(tl.where(digit[None, :] == own, each, 0), 1)


@triton.jit
def _count(
    scores,
    classes,
    before_counts,
    before_state,
    before_over,
    counts,
    state,
    over,
    scores_row,
    scores_head,
    scores_token,
    classes_row,
    classes_token,
    heads,
    tokens,
    first,
    last,
    k,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    BEFORE: tl.constexpr,
    CLASSES: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = row * PARTS + tl.arange(0, PARTS)
    # The digits so far of the last one that is chosen, how many more are wanted, and how many of each part are above.
    prefix, wanted, higher = row * 0, row * 0 + k, tl.zeros([PARTS], tl.int32)
    if BEFORE > 1:
        each = tl.load(before_counts + parts[:, None] * BEFORE + tl.arange(0, BEFORE)[None, :])
        wanted = tl.load(before_state + row * 2 + 1)
        own, above, _ = _digit(each, wanted, PARTS, BEFORE)
        prefix = tl.load(before_state + row * 2) * BEFORE + own
        wanted -= tl.sum(above)
        higher = tl.load(before_over + parts) + above
    if part == 0:
        tl.store(state + row * 2, prefix)
        tl.store(state + row * 2 + 1, wanted)
        tl.store(over + parts, higher)
    found = tl.zeros([BINS], tl.int32)
    length = tl.cdiv(tl.cdiv(tokens, PARTS), PART) * PART
    for begin in range(part * length, tl.minimum((part + 1) * length, tokens), PART):
        token = begin + tl.arange(0, PART).to(tl.int64)
        inside = token < tokens
        group = tl.where((token < first) | (token >= tokens - last), 2, 1)
        if CLASSES:
            group = tl.load(classes + (row // heads) * classes_row + token * classes_token, mask=inside, other=0)
        address = scores + (row // heads) * scores_row + (row % heads) * scores_head + token * scores_token
        key = _packed(tl.load(address, mask=inside, other=0), group, inside)
        within = (key >= 0) & ((key >> SHIFT) // BINS == prefix) if BEFORE > 1 else key >= 0
        digit = tl.where(within, (key >> SHIFT) & (BINS - 1), 0).to(tl.int32)
        found += tl.histogram(digit, BINS, mask=within)
    tl.store(counts + (row * PARTS + part) * BINS + tl.arange(0, BINS), found)


@triton.jit
def _write(
    scores,
    classes,
    before_counts,
    before_state,
    before_over,
    out,
    scores_row,
    scores_head,
    scores_token,
    classes_row,
    classes_token,
    heads,
    tokens,
    first,
    last,
    k,
    BEFORE: tl.constexpr,
    INDICES: tl.constexpr,
    CLASSES: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    parts = row * PARTS + tl.arange(0, PARTS)
    each = tl.load(before_counts + parts[:, None] * BEFORE + tl.arange(0, BEFORE)[None, :])
    wanted = tl.load(before_state + row * 2 + 1)
    own, above, same = _digit(each, wanted, PARTS, BEFORE)
    bound, spare = tl.load(before_state + row * 2) * BEFORE + own, wanted - tl.sum(above)
    higher = tl.load(before_over + parts) + above
    earlier = tl.arange(0, PARTS) < part
    taken = tl.sum(tl.where(earlier, same, 0)).to(tl.int64)
    slot = tl.sum(tl.where(earlier, higher, 0)) + tl.minimum(taken, spare)
    length = tl.cdiv(tl.cdiv(tokens, PARTS), PART) * PART
    for begin in range(part * length, tl.minimum((part + 1) * length, tokens), PART):
        token = begin + tl.arange(0, PART).to(tl.int64)
        inside = token < tokens
        group = tl.where((token < first) | (token >= tokens - last), 2, 1)
        if CLASSES:
            group = tl.load(classes + (row // heads) * classes_row + token * classes_token, mask=inside, other=0)
        address = scores + (row // heads) * scores_row + (row % heads) * scores_head + token * scores_token
        key = _packed(tl.load(address, mask=inside, other=0), group, inside)
        equal = (key == bound).to(tl.int32)
        keep = (key > bound) | ((equal > 0) & (taken + tl.cumsum(equal, 0) <= spare))
        if INDICES:
            place = slot + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(out + row * k + place, token, mask=keep)
        else:
            tl.store(out + row * tokens + token, keep, mask=inside)
        taken += tl.sum(equal)
        slot += tl.sum(keep.to(tl.int32))


# Sizes follow from the digits; only how many warps share them is open.
_tuned_count, _tuned_write = (
    _triton_tiles.autotuned(kernel, (), [(4, 3), (8, 3), (16, 3)], ("BEFORE",)) for kernel in (_count, _write)
)
