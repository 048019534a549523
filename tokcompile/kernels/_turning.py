"""Rotations of heads by cosines and sines, and back, for the ops that need keys without their positions."""

from __future__ import annotations

import torch
from torch import Tensor


def turn(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """Turn the first W numbers of each head; the others stay.

    Args:
        x: float [B, H, T, D].
        cos, sin: float [B or 1, H or 1, T, W], a column for each number that is turned.
        neighbours: whether the numbers of a pair stand side by side, and not W / 2 from each other.
    """
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([part * cos + _partner(part, neighbours) * sin, rest], -1)


def unturn(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool) -> Tensor:
    """What `turn` was given, up to rounding; tables may scale what they turn, as those of longer texts do."""
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    back = part * cos - _partner(part, neighbours) * sin
    return torch.cat([back / (cos * cos + sin * sin), rest], -1)


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Refuse tables that do not fit keys. Raises ValueError."""
    fits = x.dim() == cos.dim() == 4 and cos.shape == sin.shape and cos.shape[-1] <= x.shape[-1]
    if not fits or cos.shape[-1] % 2:
        raise ValueError(
            f"keys and tables must be [B, H, T, D] and [B or 1, H or 1, T, W], W even and at most D, not "
            f"{list(x.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )


def _partner(x: Tensor, neighbours: bool) -> Tensor:
    """The other number of each pair, the second ones with their sign changed."""
    if neighbours:
        one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([-two, one], -1).flatten(-2)
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)
