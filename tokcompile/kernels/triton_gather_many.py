"""The Triton kernel of gathers by one index: up to four values in one launch, whatever their dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_gather as plans
from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_gather import _part

MOST = 4
PAIRS = 3


def supports(values: Sequence[Tensor], index: Tensor, forms: Sequence[int]) -> str | None:
    """Why these gathers cannot be one launch; None when they can."""
    del forms
    if not 0 < len(values) <= MOST:
        return f"{len(values)} values; a launch gathers 1 to {MOST}"
    return next((found for value in values if (found := plans.fault(value, index))), None)


def launch(values: Sequence[Tensor], index: Tensor, forms: Sequence[int]) -> list[Tensor]:
    """As the reference; the results are contiguous."""
    made, planned = [], []
    for value, form, dim, batch in zip(values, forms[::3], forms[1::3], forms[2::3], strict=True):
        plan = plans.PLANS[form](value, index, *((dim, batch) if form == 0 else ()))
        made.append(torch.empty(plan.shape, dtype=value.dtype, device=value.device))
        planned.append((value, made[-1], plan))
    planned = [each for each in planned if not plans.empty(each[2].shape)]
    if planned:
        _run(planned, index)
    return made


def _run(planned: list[tuple[Tensor, Tensor, plans.Plan]], index: Tensor) -> None:
    words: dict[str, object] = {}
    for place, suffix in enumerate("abcd"):
        # What is not there is the first once more, which COUNT leaves out when the kernel is compiled.
        value, out, plan = planned[place if place < len(planned) else 0]
        words |= plans.words(plan, f"_{suffix}") | {f"value_{suffix}": value, f"out_{suffix}": out}

    def grid(meta: dict[str, int]) -> tuple[Any]:
        count = plans.programs(planned[0][2], meta["TILE"])
        for _, _, plan in planned[1:]:
            count = count + plans.programs(plan, meta["TILE"])
        return (count,)

    wrap_triton(_tuned)[grid](index, **words, COUNT=len(planned))


@triton.jit
def _tiles(rows, columns, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    return tl.cdiv(rows, TILE // COLUMNS) * tl.cdiv(columns, COLUMNS)


# fmt: off
@triton.jit
def _gather_many(
    index,
    value_a, out_a, n1_a, n2_a, n3_a, x0_a, x1_a, x2_a, x3_a, i0_a, i1_a, i2_a, i3_a, rows_a, columns_a, xc_a,
    ic_a, token_a, tokens_a, head_a,
    ALONG_a: tl.constexpr, PAIRS_a: tl.constexpr, COLUMNS_a: tl.constexpr,
    value_b, out_b, n1_b, n2_b, n3_b, x0_b, x1_b, x2_b, x3_b, i0_b, i1_b, i2_b, i3_b, rows_b, columns_b, xc_b,
    ic_b, token_b, tokens_b, head_b,
    ALONG_b: tl.constexpr, PAIRS_b: tl.constexpr, COLUMNS_b: tl.constexpr,
    value_c, out_c, n1_c, n2_c, n3_c, x0_c, x1_c, x2_c, x3_c, i0_c, i1_c, i2_c, i3_c, rows_c, columns_c, xc_c,
    ic_c, token_c, tokens_c, head_c,
    ALONG_c: tl.constexpr, PAIRS_c: tl.constexpr, COLUMNS_c: tl.constexpr,
    value_d, out_d, n1_d, n2_d, n3_d, x0_d, x1_d, x2_d, x3_d, i0_d, i1_d, i2_d, i3_d, rows_d, columns_d, xc_d,
    ic_d, token_d, tokens_d, head_d,
    ALONG_d: tl.constexpr, PAIRS_d: tl.constexpr, COLUMNS_d: tl.constexpr,
    COUNT: tl.constexpr, TILE: tl.constexpr,
):
    program = tl.program_id(0)
    end_a = _tiles(rows_a, columns_a, COLUMNS_a, TILE)
    end_b = end_a + _tiles(rows_b, columns_b, COLUMNS_b, TILE)
    end_c = end_b + _tiles(rows_c, columns_c, COLUMNS_c, TILE)
    if program < end_a:
        _part(
            program, value_a, index, out_a, n1_a, n2_a, n3_a, x0_a, x1_a, x2_a, x3_a, i0_a, i1_a, i2_a,
            i3_a, rows_a, columns_a, xc_a, ic_a, token_a, tokens_a, head_a, ALONG_a, PAIRS_a, COLUMNS_a, TILE,
        )
    if COUNT > 1:
        if (program >= end_a) & (program < end_b):
            _part(
                program - end_a, value_b, index, out_b, n1_b, n2_b, n3_b, x0_b, x1_b, x2_b, x3_b,
                i0_b, i1_b, i2_b, i3_b, rows_b, columns_b, xc_b, ic_b, token_b, tokens_b, head_b,
                ALONG_b, PAIRS_b, COLUMNS_b, TILE,
            )
    if COUNT > 2:
        if (program >= end_b) & (program < end_c):
            _part(
                program - end_b, value_c, index, out_c, n1_c, n2_c, n3_c, x0_c, x1_c, x2_c, x3_c,
                i0_c, i1_c, i2_c, i3_c, rows_c, columns_c, xc_c, ic_c, token_c, tokens_c, head_c,
                ALONG_c, PAIRS_c, COLUMNS_c, TILE,
            )
    if COUNT > 3:
        if program >= end_c:
            _part(
                program - end_c, value_d, index, out_d, n1_d, n2_d, n3_d, x0_d, x1_d, x2_d, x3_d,
                i0_d, i1_d, i2_d, i3_d, rows_d, columns_d, xc_d, ic_d, token_d, tokens_d, head_d,
                ALONG_d, PAIRS_d, COLUMNS_d, TILE,
            )
# fmt: on


_tuned = _triton_tiles.autotuned(
    _gather_many, ("TILE",), plans.TILES, ("COUNT", *(f"COLUMNS_{each}" for each in "abcd")), plans.WIDEST
)
