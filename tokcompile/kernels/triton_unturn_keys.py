"""The Triton part of unturn_keys: each number of a key is read with its partner, and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_gather import block, empty

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 512


def supports(keys: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del neighbours
    if any(each.dtype not in DTYPES for each in (keys, cos, sin)):
        return f"no kernel turns {keys.dtype} by tables of {cos.dtype} and {sin.dtype}"
    return None if keys.shape[3] <= WIDEST else f"heads of {keys.shape[3]} numbers; at most {WIDEST}"


def launch(keys: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """As the reference."""
    batch, heads, tokens, width = keys.shape
    out = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    if empty(keys.shape):
        return out
    columns = block(width, WIDEST)
    table_strides = [0 if table.shape[d] == 1 and d < 2 else table.stride(d) for table in (cos, sin) for d in range(4)]
    wrap_triton(_tuned)[lambda meta: (triton.cdiv(tokens, meta["TILE"] // columns), heads, batch)](
        keys,
        cos,
        sin,
        out,
        *keys.stride(),
        *table_strides,
        heads,
        tokens,
        width,
        cos.shape[3],
        NEIGHBOURS=neighbours,
        COLUMNS=columns,
    )
    return out


@triton.jit
def _unturn(
    keys,
    cos,
    sin,
    out,
    keys_row,
    keys_head,
    keys_token,
    keys_column,
    cos_row,
    cos_head,
    cos_token,
    cos_column,
    sin_row,
    sin_head,
    sin_token,
    sin_column,
    heads,
    tokens,
    width,
    turned,
    NEIGHBOURS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    ROWS: tl.constexpr = TILE // COLUMNS
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS).to(tl.int64)
    inside = (token < tokens)[:, None] & (column < width)[None, :]
    part = (token < tokens)[:, None] & (column < turned)[None, :]
    if NEIGHBOURS:
        first = column % 2 == 0
        partner = tl.where(first, column + 1, column - 1)
    else:
        first = column < turned // 2
        partner = tl.where(first, column + turned // 2, column - turned // 2)
    at = keys + row * keys_row + head * keys_head + token[:, None] * keys_token
    own = tl.load(at + column[None, :] * keys_column, mask=inside, other=0).to(tl.float32)
    other = tl.load(at + partner[None, :] * keys_column, mask=part, other=0).to(tl.float32)
    other = tl.where(first[None, :], -other, other)
    at_cos = cos + row * cos_row + head * cos_head + token[:, None] * cos_token + column[None, :] * cos_column
    at_sin = sin + row * sin_row + head * sin_head + token[:, None] * sin_token + column[None, :] * sin_column
    c = tl.where(part, tl.load(at_cos, mask=part, other=0).to(tl.float32), 1.0)
    s = tl.load(at_sin, mask=part, other=0).to(tl.float32)
    found = tl.where(part, (own * c - other * s) / (c * c + s * s), own)
    tl.store(out + ((row * heads + head) * tokens + token[:, None]) * width + column[None, :], found, mask=inside)


_tuned = _triton_tiles.autotuned(
    _unturn,
    ("TILE",),
    [(1024, 4, 1), (2048, 4, 1), (4096, 4, 1), (4096, 8, 1)],
    ("NEIGHBOURS", "COLUMNS"),
    WIDEST,
)
