"""The Triton part of mark_slots: a program walks each row twice, to count what stays and to write it at the end."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import wrap_triton

BLOCK = 2048


def supports(runs: Tensor, length: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del runs, length
    return None


def launch(runs: Tensor, length: Any) -> Tensor:
    """As the reference."""
    batch, tokens = runs.shape
    out = torch.empty((batch, length), dtype=torch.int64, device=runs.device)
    if not (isinstance(length, int) and length == 0):
        wrap_triton(_mark)[(batch,)](runs, out, runs.stride(0), runs.stride(1), tokens, length, BLOCK=BLOCK)
    return out


@triton.jit
def _ends_and_stays(runs, at_row, step, token, tokens):
    """Which tokens end a run, and which stand in the new sequence."""
    run = tl.load(runs + at_row + token * step, mask=token < tokens, other=1) != 0
    after = tl.load(runs + at_row + (token + 1) * step, mask=token + 1 < tokens, other=0) != 0
    ends = run & (after == 0) & (token < tokens)
    return ends, ends | (run == 0)


@triton.jit
def _mark(runs, out, runs_row, runs_token, tokens, length, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    count = tl.zeros([], dtype=tl.int64)
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        _, stays = _ends_and_stays(runs, row * runs_row, runs_token, token, tokens)
        count += tl.sum(stays.to(tl.int64))
    spare = length - count
    for begin in range(0, tokens, BLOCK):
        token = begin + tl.arange(0, BLOCK).to(tl.int64)
        ends, stays = _ends_and_stays(runs, row * runs_row, runs_token, token, tokens)
        slot = spare + tl.cumsum(stays.to(tl.int64), 0) - 1
        tl.store(out + row * length + slot, tl.where(ends, -2 - token, token), mask=stays & (slot >= 0))
        spare += tl.sum(stays.to(tl.int64))
    for begin in range(0, length, BLOCK):
        slot = begin + tl.arange(0, BLOCK).to(tl.int64)
        tl.store(out + row * length + slot, slot * 0 - 1, mask=slot < length - count)
