"""tokred::turn_pairs: queries or keys that stand at other positions, by the rotation that they have already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from . import _library


def reference(
    x: Tensor,
    here: Tensor,
    there: Tensor,
    frequencies: Tensor,
    start: int,
    neighbours: bool,
    coordinate: Sequence[int] | None = None,
) -> Tensor:
    """Turn each pair of numbers from its angle at one position to its angle at another.

    Su et al. 2021 (RoFormer), section 3.2: rotations of one plane add up. Cosine and sine of the difference are made
    of those of the two angles, each of which is rounded to float32 as a model rounds it: so what a model turned to
    `here` is turned back exactly, however far away that is.

    Args:
        x: float [B, H, T, D].
        here, there: positions, integers or floats [B or 1, T] or [B or 1, H or 1, T]; of tokens that have several,
            as those of an image in time, height and width, [B or 1, H or 1, T, A].
        frequencies: float [P], or [B, P] where rows have their own: radians a position of each pair.
        start: where in D the 2 P numbers begin that are turned; the others stay.
        neighbours: whether a pair is two numbers side by side (2 i, 2 i + 1), and not (i, i + P).
        coordinate: which of A positions turns each of the P pairs; None where tokens have one. Positions without a
            dimension A are those of every coordinate.

    Returns:
        [B, H, T, D], of the dtype of `x`; computed in float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    pairs = frequencies.shape[-1] if frequencies.dim() in (1, 2) else 0
    if x.dim() != 4 or not pairs or not 0 <= start <= x.shape[3] - 2 * pairs:
        raise ValueError(
            f"x must be [B, H, T, D] with {2 * pairs} numbers from {start} on, and frequencies [B, P], "
            f"not {list(x.shape)} and {list(frequencies.shape)}"
        )
    check(here, there, frequencies, coordinate)
    (cos_a, sin_a), (cos_b, sin_b) = (_waves(at, frequencies, coordinate) for at in (here, there))
    cos, sin = cos_b * cos_a + sin_b * sin_a, sin_b * cos_a - cos_b * sin_a
    part = x[..., start : start + 2 * pairs].to(torch.float32)
    if neighbours:
        one, two = part.unflatten(-1, (pairs, 2)).unbind(-1)
        turned = torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)
    else:
        one, two = part[..., :pairs], part[..., pairs:]
        turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1)
    whole = torch.cat([x[..., :start], turned.to(x.dtype), x[..., start + 2 * pairs :]], -1)
    return whole.reshape(x.shape)


def _waves(positions: Tensor, frequencies: Tensor, coordinate: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B or 1, H or 1, T, P]."""
    if positions.dim() == 2:
        positions = positions[:, None]
    each = frequencies.to(torch.float32).reshape(-1, 1, 1, frequencies.shape[-1])
    if coordinate is None or positions.dim() == 3:
        positions = positions[..., None]
    else:
        # Of parts that are alike, as a list of places would be one more tensor, which a graph has to keep.
        runs = [(own, len(list(run))) for own, run in groupby(coordinate)]
        parts = [positions[..., own : own + 1].expand(*positions.shape[:3], count) for own, count in runs]
        positions = torch.cat(parts, -1)
    angles = positions.to(torch.float32) * each
    return angles.cos(), angles.sin()


def check(here: Tensor, there: Tensor, frequencies: Tensor, coordinate: Sequence[int] | None) -> None:
    """Refuse positions that are not those of tokens, or of their coordinates. Raises ValueError."""
    ranks = (2, 3) if coordinate is None else (2, 3, 4)
    for positions in (here, there):
        if positions.dim() not in ranks:
            several = "" if coordinate is None else " or [B, H, T, A]"
            raise ValueError(f"positions must be [B, T] or [B, H, T]{several}, not {list(positions.shape)}")
    if here.dim() == there.dim() == 4 and here.shape[3] != there.shape[3]:
        raise ValueError(f"tokens have {here.shape[3]} coordinates here and {there.shape[3]} there")
    if coordinate is None:
        return
    if len(coordinate) != frequencies.shape[-1]:
        raise ValueError(f"a coordinate for each of {frequencies.shape[-1]} pairs, not {len(coordinate)}")
    several = [positions.shape[3] for positions in (here, there) if positions.dim() == 4]
    if several and not 0 <= min(coordinate) <= max(coordinate) < several[0]:
        raise ValueError(f"pairs are turned by coordinates up to {max(coordinate)}, and tokens have {several[0]}")


turn_pairs = _library.define(
    "turn_pairs(Tensor x, Tensor here, Tensor there, Tensor frequencies, int start, bool neighbours, "
    "int[]? coordinate=None) -> Tensor",
    reference,
    triton="triton_turn_pairs",
)
