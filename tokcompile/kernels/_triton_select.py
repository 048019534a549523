"""What the Triton kernels that select by score share: the exact order of `_order`, and the k first of it.

Rows of at most MOST tokens, each in one program that reads it once. The k-th key is found bit by bit from the top, two
bits in each pass over registers: exact, and the same whatever the order in which threads add up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 16384
BITS = 34
"""Of a key: 32 of the score, and above them the class."""
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8),
}


def fault(scores: Tensor, tokens: Any) -> str | None:
    """Why rows of scores cannot be selected from; None when they can."""
    if scores.dtype not in DTYPES:
        return f"no kernel reads scores of {scores.dtype}"
    if not 0 < tokens <= MOST:
        return f"rows of {tokens} tokens; the kernel holds 1 to {MOST}"
    return None


def width(tokens: Any) -> int:
    """The block that holds a row: a power of two. A symbolic number of tokens stays open between two of these."""
    found = 16
    while found < tokens:
        found *= 2
    return found


def warps(block: int) -> int:
    """So that no thread holds more than 32 keys of a row."""
    return min(max(block // 512, 1), 16)


@triton.jit
def sortable(scores):
    """As `_order.sortable`: int64 in [0, 2^32), in the order of scores as float32; NaN is 0, and -0.0 equals 0.0."""
    if scores.dtype == tl.bfloat16:
        # The upper half of a float32; the interpreter converts tiny ones otherwise.
        bits = scores.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    bits = tl.where(size == 0, 0, bits)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    return tl.where(size > 0x7F800000, 0, ordered)


@triton.jit
def largest(keys, k, BITS: tl.constexpr):
    """The k largest of keys [N], lower places first among equal ones; below 2^BITS, and -1 where there is no token."""
    bound = tl.sum(keys * 0)
    for step in tl.static_range(BITS // 2):
        one = bound + (1 << (BITS - 2 - 2 * step))
        two = one + (1 << (BITS - 2 - 2 * step))
        three = two + (1 << (BITS - 2 - 2 * step))
        # Three counts of at most 2^20 in one sum.
        packed = (keys >= one).to(tl.int64) + ((keys >= two).to(tl.int64) << 20) + ((keys >= three).to(tl.int64) << 40)
        counts = tl.sum(packed)
        bound = tl.where((counts & 0xFFFFF) >= k, one, bound)
        bound = tl.where(((counts >> 20) & 0xFFFFF) >= k, two, bound)
        bound = tl.where((counts >> 40) >= k, three, bound)
    equal = keys == bound
    spare = k - tl.sum((keys > bound).to(tl.int32))
    return (keys > bound) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= spare))
