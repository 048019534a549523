"""The Triton part of mark_tokens: old tokens, new ones and empty slots, each read once and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_gather import TILES, WIDEST, block, check_count, empty

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(x: Tensor, slots: Tensor, content: Tensor | None) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    for value in (x, content):
        if value is not None and value.dtype not in DTYPES:
            return f"no kernel marks tokens of {value.dtype}"
    return None if slots.dtype == torch.int64 else f"slots are int64, not {slots.dtype}"


def launch(x: Tensor, slots: Tensor, content: Tensor | None) -> Tensor:
    """As the reference."""
    (batch, length), (tokens, width) = slots.shape, x.shape[1:]
    out = torch.empty((batch, length, width), dtype=x.dtype, device=x.device)
    if empty(out.shape):
        return out
    check_count(batch * length, "slots")
    columns = block(width, WIDEST)
    new = x if content is None else content
    across = triton.cdiv(width, columns)
    wrap_triton(_tuned)[lambda meta: (triton.cdiv(batch * length, meta["TILE"] // columns) * across,)](
        x,
        slots,
        new,
        out,
        *x.stride(),
        *slots.stride(),
        *content_strides(new),
        batch * length,
        length,
        tokens,
        width,
        MADE=content is not None,
        COLUMNS=columns,
    )
    return out


def content_strides(content: Tensor) -> tuple[Any, Any, Any]:
    """How far a row, a slot and a number are apart in [C], [B, C] or [B, T', C]; 0 where one stands for all."""
    strides = content.stride()
    if content.dim() == 2:
        return strides[0], 0, strides[1]
    return (0,) * (3 - content.dim()) + strides


@triton.jit
def _fill(
    x,
    slots,
    content,
    out,
    x_row,
    x_token,
    x_column,
    slots_row,
    slots_slot,
    content_row,
    content_slot,
    content_column,
    rows,
    length,
    tokens,
    width,
    MADE: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // COLUMNS
    across = tl.cdiv(width, COLUMNS)
    # 32 bits hold them, and a GPU divides in these much faster.
    place = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    row, slot = (place // length).to(tl.int64), (place % length).to(tl.int64)
    inside = (place < rows)[:, None] & (column < width)[None, :]
    held = tl.load(slots + row * slots_row + slot * slots_slot, mask=place < rows, other=-1)
    old = held >= 0
    token = tl.minimum(tl.maximum(held, 0), tokens - 1)
    address = x + (row * x_row + token * x_token)[:, None] + (column * x_column)[None, :]
    found = tl.load(address, mask=inside & old[:, None], other=0)
    if MADE:
        address = content + (row * content_row + slot * content_slot)[:, None] + (column * content_column)[None, :]
        made = tl.load(address, mask=inside & (held < -1)[:, None], other=0).to(found.dtype)
        found = tl.where(old[:, None], found, made)
    tl.store(out + place.to(tl.int64)[:, None] * width + column[None, :], found, mask=inside)


_tuned = _triton_tiles.autotuned(_fill, ("TILE",), TILES, ("MADE", "COLUMNS"), WIDEST)
