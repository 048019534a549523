"""The Triton part of fill_mask: up to four priority groups, then the score, in one launch for all but long rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_long_rows as long_rows
from . import _triton_select as select
from ._triton import wrap_triton
from ._triton_select import largest, sortable

GROUPS = 4


def supports(first: Sequence[Tensor], scores: Tensor, among: Tensor | None, k: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del among, k
    if len(first) > GROUPS:
        return f"{len(first)} priority groups; the kernel takes {GROUPS}"
    return select.fault(scores, scores.shape[1])


def launch(first: Sequence[Tensor], scores: Tensor, among: Tensor | None, k: Any) -> Tensor:
    """As the reference."""
    batch, tokens = scores.shape
    if tokens > select.MOST:
        return long_rows.select(scores[:, None], _classes(first, among), 0, 0, k, indices=False)[:, 0]
    out = torch.empty((batch, tokens), dtype=torch.bool, device=scores.device)
    masks = [scores if among is None else among, *first, *[scores] * (GROUPS - len(first))]
    words = {f"mask_{n}": mask for n, mask in enumerate(masks)}
    words |= {f"row_{n}": mask.stride(0) for n, mask in enumerate(masks)}
    words |= {f"token_{n}": mask.stride(1) for n, mask in enumerate(masks)}
    block = select.width(tokens)
    wrap_triton(_tuned[block])[(batch,)](
        scores,
        out,
        scores.stride(0),
        scores.stride(1),
        tokens,
        k,
        **words,
        AMONG=among is not None,
        COUNT=len(first),
        BLOCK=block,
    )
    return out


def _classes(first: Sequence[Tensor], among: Tensor | None) -> Tensor | None:
    """int8 [B, N]: the reference's classes; None: all are of one."""
    if not first:
        return among
    classes = torch.ones_like(first[0], dtype=torch.int8) if among is None else among.to(torch.int8)
    for rank, group in enumerate(reversed(first)):
        classes = torch.where(group, rank + 2, classes)
    return classes


@triton.jit
def _class(classes, mask, at_row, at_token, inside, rank):
    chosen = tl.load(mask + at_row + at_token, mask=inside, other=0) != 0
    return tl.where(chosen, rank, classes)


@triton.jit
def _fill(
    scores,
    out,
    scores_row,
    scores_token,
    tokens,
    k,
    mask_0,
    mask_1,
    mask_2,
    mask_3,
    mask_4,
    row_0,
    row_1,
    row_2,
    row_3,
    row_4,
    token_0,
    token_1,
    token_2,
    token_3,
    token_4,
    AMONG: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < tokens
    token = place.to(tl.int64)
    classes = tl.full([BLOCK], 1, tl.int32)
    if AMONG:
        classes = _class(classes * 0, mask_0, row * row_0, token * token_0, inside, 1)
    # A token in several groups is of the first one, which is therefore looked at last.
    if COUNT > 3:
        classes = _class(classes, mask_4, row * row_4, token * token_4, inside, COUNT - 2)
    if COUNT > 2:
        classes = _class(classes, mask_3, row * row_3, token * token_3, inside, COUNT - 1)
    if COUNT > 1:
        classes = _class(classes, mask_2, row * row_2, token * token_2, inside, COUNT)
    if COUNT > 0:
        classes = _class(classes, mask_1, row * row_1, token * token_1, inside, COUNT + 1)
    keys = sortable(tl.load(scores + row * scores_row + token * scores_token, mask=inside, other=0))
    keep = largest(keys, tl.where(inside, classes, -1), k, COUNT + 2)
    tl.store(out + row * tokens + token, keep, mask=inside)


_tuned = select.tuned(_fill)
