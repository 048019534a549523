"""What Triton kernels of attention share: logits of a tile, and what is known of their arguments.

Logits are kept in base 2, so that exp2 alone makes weights of them. Imported only where Triton is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from . import _attention, _triton

INTERPRETED = _triton.interpreted()
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256
PROGRAMS = 512
"""Programs that fill any GPU several times over; shorter grids are split. One number, so that sums are alike on all."""
MOST_PARTS = 32
LEAST_PART = 256
"""How long a part is at least, and what it is a multiple of, as of any tile."""

NO_MASK, BOOL_MASK, ADDED_MASK = range(3)

# Three products of tensor cores, of which each has eleven bits, are as exact as one in float32 but for the last bits.
_PRECISION = tl.constexpr("ieee" if INTERPRETED else "tf32x3")
AS_FLOAT32 = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(_attention.LOG2E)
LOWEST = tl.constexpr(_attention.LOWEST)


def autotuned(
    kernel: Any, names: Sequence[str], tiles: Sequence[tuple[int, ...]], key: Sequence[str], interpreted: int = 16
) -> Any:
    """`kernel` with the tiles that are fastest for each value of `key`.

    Args:
        names: the constants that make a tile; none where warps alone do.
        tiles: for each of `names` a size, then warps and stages.
        interpreted: each size under the interpreter, where time means nothing and small inputs are to have several
            tiles.
    """
    if INTERPRETED:
        tiles = [(*(interpreted for _ in names), 1, 1)]
    configs = [
        triton.Config(dict(zip(names, sizes, strict=True)), num_warps=warps, num_stages=stages)
        for *sizes, warps, stages in tiles
    ]
    return triton.autotune(configs=configs, key=list(key))(kernel)


def autotuned_by_dtype(
    kernel: Any,
    names: Sequence[str],
    half: Sequence[tuple[int, ...]],
    single: Sequence[tuple[int, ...]],
    key: Sequence[str],
) -> dict[bool, Any]:
    """`autotuned` by whether the kernel is EXACT: tiles of float32 take twice the memory and, for three products of
    tensor cores in place of one, three times the registers. Those for half precision would spill thousands of bytes a
    thread, and take a compiler minutes.
    """
    return {exact: autotuned(kernel, names, tiles, key) for exact, tiles in ((False, half), (True, single))}


def most_rows(depth: int, exact: bool) -> int:
    """Of a tile that holds all rows there are: a GPU with 99 KB of shared memory has room for it, and for keys."""
    return 16 if exact and depth > 128 else 64


def in_wide_rows(mask: Tensor) -> Tensor:
    """A mask [..., Tk] whose rows begin at multiples of 16, as Triton wants them to read more than a number at a time.

    It is a copy where rows begin elsewhere, or may: of a mask of 9,080 tokens, say. There each number would be read by
    itself, from an address of its own, and for that many addresses a thread has no registers.
    """
    strides = mask.stride()
    if strides[-1] != 1 or all(isinstance(each, int) and each % 16 == 0 for each in strides[:-1]):
        return mask
    # What is broadcast is copied once.
    once = mask[tuple(slice(0, 1) if isinstance(each, int) and each == 0 else slice(None) for each in strides)]
    keys = mask.shape[-1]
    return pad(once, (0, -keys % 16))[..., :keys].expand(mask.shape)


def unfit(query: Tensor, *others: Tensor) -> str | None:
    """Why tiles of these [..., D] cannot be multiplied; None where they can: queries are of their dtype or float32."""
    dtypes = [x.dtype for x in (query, *others)]
    if any(dtype not in DTYPES for dtype in dtypes):
        return f"it takes float16, bfloat16 or float32, not {', '.join(map(str, dtypes))}"
    if len(set(dtypes[1:])) > 1 or query.dtype not in (torch.float32, *dtypes[1:]):
        return f"queries and keys must be of one dtype, or queries float32, not {', '.join(map(str, dtypes))}"
    widths = [x.shape[-1] for x in (query, *others)]
    return f"heads of more than {WIDEST} numbers: {', '.join(map(str, widths))}" if max(widths) > WIDEST else None


def mask_kind(mask: Tensor | None) -> int:
    """NO_MASK, BOOL_MASK or ADDED_MASK."""
    if mask is None:
        return NO_MASK
    return BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK


def width(depth: int) -> int:
    """Numbers of a tile that holds heads of `depth` numbers: a power of two, and at least what tl.dot takes."""
    return power_of_2(depth, 16)


def power_of_2(length: Any, least: int = 1) -> int:
    """The first power of two, from `least` on, that is no less. A symbolic length stays open between two of these."""
    found = least
    while found < length:
        found *= 2
    return found


def parts_of(programs: int, length: int) -> tuple[int, int]:
    """Into how many parts, and how long ones, to cut a length that each of `programs` programs would go through."""
    parts = max(1, min(-(-PROGRAMS // max(programs, 1)), -(-length // LEAST_PART), MOST_PARTS))
    part = max(1, -(-length // parts // LEAST_PART)) * LEAST_PART
    return max(1, -(-length // part)), part


@triton.jit
def base2(logits, scale, softcap, CAPPED: tl.constexpr):
    """Products of queries and keys as scaled, soft-capped logits times log2(e)."""
    # Triton takes Python's floats for float32, and Inductor hands them over as float64.
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    if CAPPED:
        # tanh(z) = 1 - 2 / (exp(2 z) + 1) holds at both ends, where exp is infinite or 0.
        twice = tl.exp2(logits * (scale / softcap * 2 * LOG2E))
        logits = softcap * LOG2E * (1 - 2 / (twice + 1))
    else:
        logits = logits * (scale * LOG2E)
    return logits


@triton.jit
def added(value):
    """What an additive mask or a sink adds to logits in base 2: the lowest floats stay finite, and only -inf hides."""
    value = value.to(tl.float32)
    return tl.where(value == float("-inf"), value, tl.maximum(value * LOG2E, LOWEST))


@triton.jit
def masked(logits, at, inside, MASK: tl.constexpr):
    """Logits in base 2 under the mask at pointers `at`; MASK 1: bools, False is hidden; 2: floats, added; 0: none."""
    if MASK == 1:
        logits = tl.where(tl.load(at, mask=inside, other=0) != 0, logits, float("-inf"))
    elif MASK == 2:
        logits = logits + added(tl.load(at, mask=inside, other=0.0))
    return logits


@triton.jit
def reach(at, counted, begin, end, keys, WIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Up to where, in whole tiles from begin on, all rows `at` see all keys, and up to where some row sees any."""
    # No row that counts sees past `last`, and all of them see up to `first`.
    last = tl.max(tl.where(counted, at, -1))
    whole = end
    if CAUSAL:
        end = tl.minimum(end, last + 1)
        whole = tl.minimum(end, tl.min(tl.where(counted, at, keys)) + 1)
    end = tl.where(last < 0, begin, tl.maximum(end, begin))
    return begin + tl.maximum(tl.minimum(whole, end) - begin, 0) // WIDE * WIDE, end


@triton.jit
def tile(
    q, key, mask, at, counted, start, end, keys, k_token, k_depth, m_query, m_key, scale, softcap,
    WIDE: tl.constexpr, DEPTH: tl.constexpr, DEEP: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
    CAPPED: tl.constexpr, EXACT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of rows `at` for WIDE keys from `start` on; EDGE where some rows see some of them only."""
    column, deep = start + tl.arange(0, WIDE), tl.arange(0, DEEP)
    spot = key + column.to(tl.int64)[None, :] * k_token + deep[:, None] * k_depth
    k = tl.load(spot, mask=(deep < DEPTH)[:, None] & (column < keys)[None, :], other=0.0)
    logits = base2(dot(q, k, EXACT), scale, softcap, CAPPED)
    if MASK != 0:
        m_at = mask + at.to(tl.int64)[:, None] * m_query + column.to(tl.int64)[None, :] * m_key
        logits = masked(logits, m_at, counted[:, None] & (column < end)[None, :], MASK)
    if EDGE:
        seen = (column < end)[None, :]
        if CAUSAL:
            seen = seen & (column[None, :] <= at[:, None])
        logits = tl.where(seen, logits, float("-inf"))
    return logits


@triton.jit
def absorb(peak, total, result, logits, v):
    """Add keys with their values to the running peaks, sums and results of rows: flash attention's inner step."""
    higher = tl.maximum(peak, tl.max(logits, 1))
    weights, shrunk = tl.exp2(logits - higher[:, None]), tl.exp2(peak - higher)
    result = result * shrunk[:, None] + dot(weights.to(v.dtype), v, v.dtype == tl.float32)
    return higher, total * shrunk + tl.sum(weights, 1), result


@triton.jit
def dot(left, right, EXACT: tl.constexpr):
    """left @ right, summed in float32; EXACT: one of the two is float32, and all its bits count.

    A float32 tile and one of half precision: the float32 one is cut into three of half precision, which hold all of it.
    """
    if not EXACT:
        product = _half_dot(left, right)
    elif left.dtype == right.dtype:
        product = tl.dot(left, right, input_precision=_PRECISION)
    elif left.dtype == tl.float32:
        high = left.to(right.dtype)
        rest = left - high.to(tl.float32)
        middle = rest.to(right.dtype)
        low = (rest - middle.to(tl.float32)).to(right.dtype)
        product = _half_dot(high, right) + (_half_dot(middle, right) + _half_dot(low, right))
    else:
        product = tl.trans(dot(tl.trans(right), tl.trans(left), True))
    return product


@triton.jit
def _half_dot(left, right):
    # The interpreter would multiply the bits of bfloat16 as integers.
    if AS_FLOAT32:
        product = tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(left, right)
    return product
