"""The Triton part of mark_slots: a program walks each row twice, to count what stays and to write it at the end."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._triton_rows import listed, tuned


def supports(runs: Tensor, length: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del runs, length
    return None


def launch(runs: Tensor, length: Any) -> Tensor:
    """As the reference."""
    return listed(_tuned, runs, length)


@triton.jit
def _kinds(run, after, inside):
    """2 for a token that ends a run, 1 for one outside of runs, 0 for one that leaves.

    Takes what was loaded: through a call that loads, PyTorch does not see that nothing of the arguments is written.
    """
    ends = (run != 0) & (after == 0)
    return tl.where(inside, tl.where(ends, 2, tl.where(run != 0, 0, 1)), 0)


@triton.jit
def _mark(runs, out, runs_row, runs_token, tokens, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    begins = runs + row * runs_row
    count = tl.zeros([], dtype=tl.int64)
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        run = tl.load(begins + token * runs_token, mask=token < tokens, other=0)
        after = tl.load(begins + (token + 1) * runs_token, mask=token + 1 < tokens, other=0)
        count += tl.sum((_kinds(run, after, token < tokens) > 0).to(tl.int64))
    spare = length - count
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        run = tl.load(begins + token * runs_token, mask=token < tokens, other=0)
        after = tl.load(begins + (token + 1) * runs_token, mask=token + 1 < tokens, other=0)
        kinds = _kinds(run, after, token < tokens)
        slot = spare + tl.cumsum((kinds > 0).to(tl.int64), 0) - 1
        tl.store(out + row * length + slot, tl.where(kinds == 2, -2 - token, token), mask=(kinds > 0) & (slot >= 0))
        spare += tl.sum((kinds > 0).to(tl.int64))
    for begin in range(0, length, BLOCK):
        slot = begin + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(out + row * length + slot, slot * 0 - 1, mask=slot < length - count)


_tuned = tuned(_mark)
