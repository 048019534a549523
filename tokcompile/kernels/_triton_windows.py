"""The Triton kernel that marks the best-scored tokens of each window of a row, or of the row as one window."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import wrap_triton
from ._triton_select import largest, sortable, tuned, width


def mark(scores: Tensor, among: Tensor | None, size: tuple[Any, Any], windows: tuple[Any, Any], k: Any) -> Tensor:
    """Mark k tokens of each window.

    Args:
        scores: [B, N].
        among: bool [B, N] or None, as for `topk_mask`.
        size: height and width of a window; N is their product times the number of windows.
        windows: how many stand above and beside each other.
        k: of each window.

    Returns:
        bool [B, N].
    """
    batch, tokens = scores.shape
    out = torch.empty((batch, tokens), dtype=torch.bool, device=scores.device)
    (high, wide), (rows, columns) = size, windows
    mask = scores if among is None else among
    block = width(high * wide)
    wrap_triton(_tuned[block])[(batch * rows * columns,)](
        scores,
        mask,
        out,
        scores.stride(0),
        scores.stride(1),
        mask.stride(0),
        mask.stride(1),
        tokens,
        high,
        wide,
        rows,
        columns,
        k,
        AMONG=among is not None,
        BLOCK=block,
    )
    return out


@triton.jit
def _mark(
    scores,
    among,
    out,
    scores_row,
    scores_token,
    among_row,
    among_token,
    tokens,
    high,
    wide,
    rows,
    columns,
    k,
    AMONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    window = program % (rows * columns)
    row = (program // (rows * columns)).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < high * wide
    line = (window // columns) * high + place // wide
    token = (line * (columns * wide) + (window % columns) * wide + place % wide).to(tl.int64)
    keys = sortable(tl.load(scores + row * scores_row + token * scores_token, mask=inside, other=0))
    classes = tl.full([BLOCK], 1, tl.int32)
    if AMONG:
        allowed = tl.load(among + row * among_row + token * among_token, mask=inside, other=0) != 0
        classes = allowed.to(tl.int32)
    keep = largest(keys, tl.where(inside, classes, -1), k, 2)
    tl.store(out + row * tokens + token, keep, mask=inside)


_tuned = tuned(_mark)
