"""The Triton kernel of gathers: rows of one last dimension, whatever is gathered, by strides of value and index.

A plan says for each dimension of the result how far one step in it goes in the value and in the index. So one kernel
serves token maps, caches per head, masks and pairs of head and token, and reads values where they stand, whatever their
strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton

TILES = [(1024, 2, 1), (2048, 4, 1), (4096, 4, 1), (4096, 8, 1), (8192, 8, 1)]
"""Elements, warps and stages of what moves tokens. A thread loads 16 or 32 elements at once."""
WIDEST = 1024
"""Columns of a tile at most: no more elements than the smallest has."""
ROW_DIMENSIONS = 4
MOST = 1 << 31
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


class Step(NamedTuple):
    """A dimension of the result: its size, and what one step in it adds in the value and in the index."""

    size: Any
    value: Any
    index: Any


class Plan(NamedTuple):
    """How a result is read.

    Attributes:
        shape: of the result.
        rows: its dimensions but the last, at most ROW_DIMENSIONS, which may be factors of those in `shape`.
        column: the last one.
        along: whether the index differs along the last one.
        token, tokens: stride and size of the dimension that the index is into.
        head: stride of heads where the index is head * tokens + token; None elsewhere.
    """

    shape: Sequence[Any]
    rows: Sequence[Step]
    column: Step
    along: bool
    token: Any
    tokens: Any
    head: Any = None


def tokens_plan(x: Tensor, source: Tensor, dim: int, batch_dim: int) -> Plan:
    """The plan of `gather_tokens`."""
    rank = x.dim()
    dim, batch_dim = dim % rank, batch_dim % rank
    steps = [Step(x.shape[d], x.stride(d), 0) for d in range(rank)]
    steps[batch_dim] = Step(source.shape[0], _stride(x, batch_dim), source.stride(0))
    steps[dim] = Step(source.shape[1], 0, source.stride(1))
    along = rank - 1 in (dim, batch_dim)
    return Plan([s.size for s in steps], steps[:-1], steps[-1], along, x.stride(dim), x.shape[dim])


def keys_plan(cache: Tensor, index: Tensor) -> Plan:
    """The plan of `gather_keys`."""
    batch, heads, tokens, width = cache.shape
    choices, kept = index.shape[1:]
    one = choices == 1
    groups = 1 if one else choices // heads
    per_head, per_group = (0, 0) if one else (index.stride(1) * groups, index.stride(1))
    rows = [
        Step(batch, _stride(cache, 0), index.stride(0)),
        Step(heads, cache.stride(1), per_head),
        Step(groups, 0, per_group),
        Step(kept, 0, index.stride(2)),
    ]
    shape = (batch, heads * groups, kept, width)
    return Plan(shape, rows, Step(width, cache.stride(3), 0), False, cache.stride(2), tokens)


def pairs_plan(cache: Tensor, pairs: Tensor) -> Plan:
    """The plan of `gather_pairs`."""
    check_count(cache.shape[1] * cache.shape[2], "pairs of a head and a token")
    rows = [Step(size, 0, pairs.stride(d)) for d, size in enumerate(pairs.shape)]
    rows[0] = rows[0]._replace(value=cache.stride(0))
    column = Step(cache.shape[3], cache.stride(3), 0)
    return Plan((*pairs.shape, cache.shape[3]), rows, column, False, cache.stride(2), cache.shape[2], cache.stride(1))


def mask_plan(mask: Tensor, index: Tensor) -> Plan:
    """The plan of `gather_mask`."""
    mask = mask.view(*[1] * (4 - mask.dim()), *mask.shape)
    (batch, choices, kept), heads = index.shape, mask.shape[1]
    few, shared = (heads, choices // heads) if choices >= heads else (choices, heads // choices)
    own, chosen = _stride(mask, 1), 0 if choices == 1 else index.stride(1)
    wide = choices >= heads
    rows = [
        Step(batch, _stride(mask, 0), index.stride(0)),
        Step(few, own if wide else own * shared, chosen * shared if wide else chosen),
        Step(shared, 0 if wide else own, chosen if wide else 0),
        Step(mask.shape[2], mask.stride(2), 0),
    ]
    shape = (batch, few * shared, mask.shape[2], kept)
    return Plan(shape, rows, Step(kept, 0, index.stride(2)), True, mask.stride(3), mask.shape[3])


PLANS = (tokens_plan, keys_plan, mask_plan, pairs_plan)
"""By the forms of `gather_many`."""


def _stride(value: Tensor, dim: int) -> Any:
    """How far a step goes: nowhere in a dimension of one, which is broadcast."""
    return 0 if value.shape[dim] == 1 else value.stride(dim)


def fault(value: Tensor, index: Tensor) -> str | None:
    """Why a value cannot be gathered by an index; None when it can."""
    if value.dtype not in DTYPES:
        return f"no kernel reads {value.dtype}"
    if index.dtype != torch.int64:
        return f"an index is int64, not {index.dtype}"
    if value.dim() > ROW_DIMENSIONS + 1:
        return f"a value of {value.dim()} dimensions; at most {ROW_DIMENSIONS + 1}"
    return None


def block(size: Any, most: int) -> int:
    """The power of two that holds a size, or `most`. A symbolic size is compared only, and stays open in a range."""
    found = 1
    while found < most and found < size:
        found *= 2
    return found


def check_count(count: Any, what: str) -> None:
    """Refuse numbers that 32 bits do not hold. Raises ValueError."""
    if count >= MOST:
        raise ValueError(f"{count} {what}; the kernel counts up to 2^31: set TOKRED_KERNELS=off")


def empty(shape: Sequence[Any]) -> bool:
    """Whether a result is known to have no elements."""
    return any(isinstance(size, int) and size == 0 for size in shape)


def gather(value: Tensor, index: Tensor, plan: Plan) -> Tensor:
    """Gather one value."""
    out = torch.empty(plan.shape, dtype=value.dtype, device=value.device)
    if not empty(plan.shape):
        numbers = words(plan)
        wrap_triton(_tuned)[lambda meta: (programs(plan, meta["TILE"]),)](value, index, out, **numbers)
    return out


def programs(plan: Plan, tile: int) -> Any:
    """How many tiles a result has."""
    columns, count = block(plan.column.size, WIDEST), 1
    for row in plan.rows:
        count = count * row.size
    return triton.cdiv(count, tile // columns) * triton.cdiv(plan.column.size, columns)


def words(plan: Plan, suffix: str = "") -> dict[str, Any]:
    """The kernel's numbers by name."""
    rows = [*[Step(1, 0, 0)] * (ROW_DIMENSIONS - len(plan.rows)), *plan.rows]
    count = 1
    for row in rows:
        count = count * row.size
    check_count(count, "rows of a gather")
    found = {f"n{d}": rows[d].size for d in (1, 2, 3)}
    found |= {f"x{d}": row.value for d, row in enumerate(rows)}
    found |= {f"i{d}": row.index for d, row in enumerate(rows)}
    found |= {"rows": count, "columns": plan.column.size, "xc": plan.column.value, "ic": plan.column.index}
    found |= {"token": plan.token, "tokens": plan.tokens, "head": plan.head or 0}
    found |= {"ALONG": plan.along, "PAIRS": plan.head is not None}
    found |= {"COLUMNS": block(plan.column.size, WIDEST)}
    return {f"{name}{suffix}": word for name, word in found.items()}


@triton.jit
def _part(
    program,
    value,
    index,
    out,
    n1,
    n2,
    n3,
    x0,
    x1,
    x2,
    x3,
    i0,
    i1,
    i2,
    i3,
    rows,
    columns,
    xc,
    ic,
    token,
    tokens,
    head,
    ALONG: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of a result."""
    ROWS: tl.constexpr = TILE // COLUMNS
    across = tl.cdiv(columns, COLUMNS)
    # Numbers of rows and tokens fit 32 bits, in which a GPU divides much faster; what they are multiplied by may not.
    row = (program // across) * ROWS + tl.arange(0, ROWS)
    column = ((program % across) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    here = row < rows
    inside = here[:, None] & (column < columns)[None, :]
    d3 = (row % n3).to(tl.int64)
    rest = row // n3
    d2 = (rest % n2).to(tl.int64)
    rest = rest // n2
    d1 = (rest % n1).to(tl.int64)
    d0 = (rest // n1).to(tl.int64)
    listed = d0 * i0 + d1 * i1 + d2 * i2 + d3 * i3
    start = d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
    if ALONG:
        which = tl.load(index + listed[:, None] + (column * ic)[None, :], mask=inside, other=0)
    else:
        which = tl.load(index + listed, mask=here, other=0)[:, None]
    if PAIRS:
        pair = which.to(tl.int32)
        moved = (pair // tokens).to(tl.int64) * head + (pair % tokens).to(tl.int64) * token
    else:
        # As the reference has it -1 is the last token. What is out of range must not read other memory.
        which = tl.where(which < 0, which + tokens, which)
        moved = tl.minimum(tl.maximum(which, 0), tokens - 1) * token
    found = tl.load(value + start[:, None] + moved + (column * xc)[None, :], mask=inside)
    tl.store(out + row.to(tl.int64)[:, None] * columns + column[None, :], found, mask=inside)


@triton.jit
def _gather(
    value,
    index,
    out,
    n1,
    n2,
    n3,
    x0,
    x1,
    x2,
    x3,
    i0,
    i1,
    i2,
    i3,
    rows,
    columns,
    xc,
    ic,
    token,
    tokens,
    head,
    ALONG: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    # fmt: off
    _part(
        tl.program_id(0), value, index, out, n1, n2, n3, x0, x1, x2, x3, i0, i1, i2, i3, rows, columns, xc, ic,
        token, tokens, head, ALONG, PAIRS, COLUMNS, TILE,
    )
    # fmt: on


_tuned = _triton_tiles.autotuned(_gather, ("TILE",), TILES, ("ALONG", "PAIRS", "COLUMNS"), WIDEST)
