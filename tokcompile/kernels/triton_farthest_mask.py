"""The Triton part of farthest_mask: a program walks through a row, all its steps in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_select as select
from ._triton import wrap_triton
from ._triton_select import LEAST, sortable

DTYPES = {torch.float16, torch.bfloat16, torch.float32}


def supports(distances: Tensor, start: Tensor, among: Tensor | None, k: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del among, k
    if distances.dtype not in DTYPES:
        return f"no kernel reads distances of {distances.dtype}"
    return select.fault(start, start.shape[1])


def launch(distances: Tensor, start: Tensor, among: Tensor | None, k: Any) -> Tensor:
    """As the reference."""
    batch, tokens = start.shape
    out = torch.empty((batch, tokens), dtype=torch.bool, device=start.device)
    mask = start if among is None else among
    block = select.width(tokens)
    wrap_triton(_tuned[block])[(batch,)](
        distances,
        start,
        mask,
        out,
        *distances.stride(),
        *start.stride(),
        *mask.stride(),
        tokens,
        k,
        AMONG=among is not None,
        BLOCK=block,
    )
    return out


@triton.jit
def _walk(
    distances,
    start,
    among,
    out,
    distances_batch,
    distances_row,
    distances_token,
    start_batch,
    start_token,
    among_batch,
    among_token,
    tokens,
    k,
    AMONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    token = place.to(tl.int64)
    inside = place < tokens
    base = distances + batch * distances_batch + token * distances_token
    first = inside
    if AMONG:
        first = tl.load(among + batch * among_batch + token * among_token, mask=inside, other=0) != 0
    count = tl.sum(first.to(tl.int32))
    far = tl.load(start + batch * start_batch + token * start_token, mask=inside, other=0).to(tl.float32)
    marked = place < 0
    for step in range(k):
        # Where all of the first ones are marked, the others follow by place.
        free = tl.where(step < count, first, inside) & (marked == 0)
        score = tl.where(free & (step < count), sortable(far), LEAST)
        # Ties go to the lowest index: the smallest of those that have the largest score.
        at = tl.min(tl.where(free & (score == tl.max(score)), place, BLOCK))
        marked = marked | (place == at)
        row = tl.load(base + at.to(tl.int64) * distances_row, mask=inside, other=0).to(tl.float32)
        far = tl.where(step == 0, row, tl.minimum(far, row, propagate_nan=tl.PropagateNan.ALL))
    tl.store(out + batch * tokens + token, marked, mask=inside)


_tuned = select.tuned(_walk)
