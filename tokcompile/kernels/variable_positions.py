"""tokred::variable_positions: positions in fractions, by which visual tokens advance less than tokens of text do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library


def reference(positions: Tensor, visual: Tensor, strides: Sequence[int], denominator: int) -> Tensor:
    """Number tokens in units of 1 / denominator: a visual token advances by its image's stride, any other by 1.

    Visual tokens that stand side by side are one image. The token after an image has the next whole position after the
    image's last one: V2PE (Ge et al. 2024), section 3.2, p = ceil(a + L * delta) + 1. What is returned differs from
    `positions` only by what images take less, so that padding, an offset, and strides of 1 leave positions as they are.

    Args:
        positions: integers [B or 1, T], the whole positions that tokens have without it.
        visual: bool [B, T].
        strides: numerators of what a token advances by, in [0, denominator]: one for all images, or one for each image
            of a row, in order; images past the end of the list take its last one.
        denominator: of the strides.

    Returns:
        int64 [B, T], numerators.

    Raises:
        ValueError: visual is not bool [B, T], or there is no stride.
    """
    if visual.dim() != 2 or visual.dtype != torch.bool or not strides:
        raise ValueError(f"visual must be bool [B, T], not {visual.dtype} {list(visual.shape)}; strides: {strides}")
    units = visual.long()
    before = torch.nn.functional.pad(units, (1, 0))[:, :-1]
    run = ((units - before) == 1).long().cumsum(1)  # from 1 on; a token of text has that of the last image before it
    stride = torch.zeros_like(run)
    for number, value in enumerate(strides, 1):
        here = run >= number if number == len(strides) else run == number
        stride = torch.where(here, value, stride)
    advanced = (units * stride).cumsum(1)
    # What images had advanced by at the last token of text before this one. Sums never fall, so that the largest value
    # so far is the last one.
    after = before * (1 - units)
    start = (advanced * (1 - units)).cummax(1).values
    start = torch.nn.functional.pad(start, (1, 0))[:, :-1]
    spare = torch.remainder(start - advanced, denominator)
    whole = (after * spare).cumsum(1)
    less = units.cumsum(1) * denominator - advanced - whole
    return positions.long() * denominator - less


variable_positions = _library.define(
    "variable_positions(Tensor positions, Tensor visual, int[] strides, int denominator) -> Tensor", reference
)
