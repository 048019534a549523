"""tokred::turn_pairs: queries or keys that stand at other positions, by the rotation that they have already."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, here: Tensor, there: Tensor, frequencies: Tensor, start: int, neighbours: bool) -> Tensor:
    """Turn each pair of numbers from its angle at one position to its angle at another.

    Su et al. 2021 (RoFormer), section 3.2: rotations of one plane add up. Cosine and sine of the difference are made
    of those of the two angles, each of which is rounded to float32 as a model rounds it: so what a model turned to
    `here` is turned back exactly, however far away that is.

    Args:
        x: float [B, H, T, D].
        here, there: positions, integers or floats [B or 1, T] or [B or 1, H or 1, T].
        frequencies: float [P], or [B, P] where rows have their own: radians a position of each pair.
        start: where in D the 2 P numbers begin that are turned; the others stay.
        neighbours: whether a pair is two numbers side by side (2 i, 2 i + 1), and not (i, i + P).

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
    (cos_a, sin_a), (cos_b, sin_b) = (_waves(at, frequencies) for at in (here, there))
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


def _waves(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [B or 1, H or 1, T, P]."""
    if positions.dim() == 2:
        positions = positions[:, None]
    if positions.dim() != 3:
        raise ValueError(f"positions must be [B, T] or [B, H, T], not {list(positions.shape)}")
    each = frequencies.to(torch.float32).reshape(-1, 1, 1, frequencies.shape[-1])
    angles = positions[..., None].to(torch.float32) * each
    return angles.cos(), angles.sin()


turn_pairs = _library.define(
    "turn_pairs(Tensor x, Tensor here, Tensor there, Tensor frequencies, int start, bool neighbours) -> Tensor",
    reference,
    triton="triton_turn_pairs",
)
