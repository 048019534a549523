"""The Triton part of keep_keys: a program for each head of each row, or for parts of long ones, writes what stays."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_long_rows as long_rows
from . import _triton_select as select
from ._triton import wrap_triton
from ._triton_select import largest, sortable
from .keep_keys import classes_of


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
    wrap_triton(_keep)[(batch * heads,)](
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
        num_warps=select.warps(block),
    )
    return out


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
):
    program = tl.program_id(0).to(tl.int64)
    row, head = program // heads, program % heads
    place = tl.arange(0, BLOCK)
    inside = place < tokens
    token = place.to(tl.int64)
    real = inside
    if VALID:
        real = tl.load(valid + row * valid_row + token * valid_token, mask=inside, other=0) != 0
    rank = tl.cumsum(real.to(tl.int32), 0)
    stays = real & ((rank <= first) | (rank > tl.sum(real.to(tl.int32)) - last))
    if AMONG:
        stays |= tl.load(among + row * among_row + token * among_token, mask=inside, other=1) == 0
    classes = tl.where(inside, tl.where(stays, 2, tl.where(real, 1, 0)), -1)
    address = scores + row * scores_row + head * scores_head + token * scores_token
    keys = sortable(tl.load(address, mask=inside, other=0))
    keep = largest(keys, classes, k, 3)
    slot = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(out + program * k + slot, token, mask=keep & inside)
