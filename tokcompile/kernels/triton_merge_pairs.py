"""tokred::merge_pairs in Triton: each slot adds up what is merged into it, in the order of the list.

The list is sorted by slot once, so that a slot finds its tokens side by side: nothing is written twice, no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from .merge_pairs import check


@triton.jit
def _merged(
    x, size, source, given, bounds, out, x_batch, x_token, x_width, s_batch, s_token, slots, count, width,
    SIZED: tl.constexpr, MEAN: tl.constexpr, BROAD: tl.constexpr,
):  # fmt: skip
    """One slot's sum of its own token and those merged into it, for BROAD of its numbers."""
    pid = tl.program_id(0)
    b, slot = (pid // slots).to(tl.int64), pid % slots
    column = tl.program_id(1) * BROAD + tl.arange(0, BROAD)
    inside, across = column < width, column.to(tl.int64) * x_width
    x += b * x_batch
    size += b * s_batch
    token = tl.load(source + b * slots + slot)
    weight = 1.0
    if SIZED:
        weight = tl.load(size + token * s_token).to(tl.float32)
    total = tl.load(x + token * x_token + across, mask=inside, other=0.0).to(tl.float32) * weight
    whole = weight + tl.zeros([BROAD], tl.float32)
    begin, end = tl.load(bounds + b * (slots + 1) + slot), tl.load(bounds + b * (slots + 1) + slot + 1)
    for i in range(begin, end):
        other = tl.load(given + b * count + i)
        share = 1.0
        if SIZED:
            share = tl.load(size + other * s_token).to(tl.float32)
        total += tl.load(x + other * x_token + across, mask=inside, other=0.0).to(tl.float32) * share
        whole += share
    if MEAN:
        total = total / whole
    spot = out + (b * slots + slot) * width + column
    tl.store(spot, total.to(out.dtype.element_ty), mask=inside)


_tuned = _triton_tiles.autotuned(
    _merged, ("BROAD",), [(256, 1, 1), (512, 1, 1), (512, 2, 1), (1024, 4, 1)], ("SIZED", "MEAN", "width"), 64
)


def supports(x: Tensor, *others: object) -> str | None:
    """Why these tokens need the reference; None where they do not."""
    if x.dtype not in _triton_tiles.DTYPES:
        return f"it takes tokens of float16, bfloat16 or float32, not {x.dtype}"
    return None


def launch(x: Tensor, size: Tensor | None, source: Tensor, given: Tensor, into: Tensor, mean: bool) -> Tensor:
    """What the reference computes, with its arguments, result and errors."""
    check(x)
    (batch, _, width), slots, count = x.shape, source.shape[1], given.shape[1]
    ordered, order = into.sort(dim=1, stable=True)
    ends = torch.arange(slots + 1, device=x.device).expand(batch, slots + 1).contiguous()
    bounds = torch.searchsorted(ordered, ends)
    out = torch.empty((batch, slots, width), dtype=x.dtype, device=x.device)
    by = x if size is None else size
    wrap_triton(_tuned)[lambda meta: (batch * slots, triton.cdiv(width, meta["BROAD"]))](
        x, by, source.contiguous(), given.gather(1, order), bounds, out,
        *x.stride(), by.stride(0), by.stride(1), slots, count, width,
        SIZED=size is not None, MEAN=mean,
    )  # fmt: skip
    return out
