"""What the Triton kernels that select by score share: the exact order of `_order`, and the k first of it.

Rows of at most MOST tokens, each in one program that reads it once; `_triton_long_rows` is for longer ones. The k-th
key is found bit by bit from the top, each in one pass over registers, a comparison and a sum: exact, and the same
whatever the order in which threads add up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles

MOST = 16384
BITS = tl.constexpr(32)
"""Of a key; as many passes, in a loop that a GPU's instruction cache holds."""
LEAST = tl.constexpr(-(1 << 31))
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
}


def fault(scores: Tensor, tokens: Any) -> str | None:
    """Why rows of scores cannot be selected from; None when they can."""
    if scores.dtype not in DTYPES:
        return f"no kernel reads scores of {scores.dtype}"
    return None if tokens > 0 else "rows without tokens"


def width(tokens: Any) -> int:
    """The block that holds a row: a power of two. A symbolic number of tokens stays open between two of these."""
    found = 16
    while found < tokens:
        found *= 2
    return found


def tuned(kernel: Any) -> dict[int, Any]:
    """A kernel with the numbers of warps that are tried, by the block that holds a row.

    No thread holds more than 32 keys of it, which would not fit its registers.
    """
    found = {}
    for block in (16 << more for more in range((MOST // 16).bit_length())):
        few = min(max(block // 512, 1), 16)
        found[block] = _triton_tiles.autotuned(kernel, (), [(few, 3), (2 * few, 3)], ())
    return found


@triton.jit
def sortable(scores):
    """As `_order.sortable`, less 2^31: int32 in the order of scores as float32; NaN is LEAST, and -0.0 equals 0.0."""
    if scores.dtype == tl.bfloat16:
        # The upper half of a float32; the interpreter converts tiny ones otherwise.
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, bits)
    return tl.where(size > 0x7F800000, LEAST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def largest(keys, classes, k, CLASSES: tl.constexpr):
    """The k first of tokens [N]: those of a higher class, then of a larger key, then of a lower place.

    Args:
        keys: int32, from `sortable`; of tokens of class 0 they do not count.
        classes: int32 below CLASSES, -1 where there is no token.
    """
    last, bound, spare = cut(keys, classes, k, CLASSES)
    above, equal = beside(keys, classes, last, bound)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))


@triton.jit
def beside(keys, classes, last, bound):
    """Which tokens come before one of class `last` and key `bound`, and which are its equals."""
    keys = _counted(keys, classes, last)
    return (classes > last) | (keys > bound), (classes == last) & (keys == bound)


@triton.jit
def _counted(keys, classes, last):
    """Keys of tokens of class `last`, if keys count in it, LEAST of the others."""
    return tl.where((classes == last) & (last > 0), keys, LEAST)


@triton.jit
def cut(keys, classes, k, CLASSES: tl.constexpr):
    """Class and key of the last of the k that `largest` chooses, and how many of its equals are chosen."""
    # The class of the last one that is chosen, and how many of that class are.
    last = tl.sum(classes * 0)
    wanted = last + k
    for each in tl.static_range(1, CLASSES):
        last = tl.where(tl.sum((classes >= each).to(tl.int32)) >= k, each, last)
    wanted -= tl.sum((classes > last).to(tl.int32))
    keys = _counted(keys, classes, last)
    # The key of the last one, bit by bit: what is not among them is LEAST, and every bound that is tried is above.
    bound = tl.sum(classes * 0) + LEAST
    bit = bound
    for _ in range(BITS):
        # The bit is not set yet; the highest is that of the sign, which makes a larger number where it is not.
        higher = bound ^ bit
        bound = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= wanted, higher, bound)
        bit = (bit >> 1) & 0x7FFFFFFF
    return last, bound, wanted - tl.sum((keys > bound).to(tl.int32))
