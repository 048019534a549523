"""The Triton part of kept_indices: a program walks each row once and writes each index where it belongs."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._triton_rows import listed, tuned


def supports(keep: Tensor, length: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del keep, length
    return None


def launch(keep: Tensor, length: Any) -> Tensor:
    """As the reference."""
    return listed(_tuned, keep, length)


@triton.jit
def _list(keep, out, keep_row, keep_token, tokens, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], dtype=tl.int64)
    last = tl.zeros([], dtype=tl.int64)
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        kept = tl.load(keep + row * keep_row + token * keep_token, mask=token < tokens, other=0) != 0
        slot = count + tl.cumsum(kept.to(tl.int64), 0) - 1
        tl.store(out + row * length + slot, token, mask=kept & (slot < length))
        count += tl.sum(kept.to(tl.int64))
        last = tl.maximum(last, tl.max(tl.where(kept, token, 0)))
    # A row of too few repeats its last one.
    for begin in range(0, length, BLOCK):
        slot = begin + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(out + row * length + slot, last + slot * 0, mask=(slot >= count) & (slot < length))


_tuned = tuned(_list)
