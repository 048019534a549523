"""tokred::dilate: grow a token mask by a stencil on the patch grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library

EDGES = ("clamp_flat", "grid")


def reference(mask: Tensor, offsets_y: list[int], offsets_x: list[int], height: int, width: int, edges: str) -> Tensor:
    """Mark every token that lies at one of the offsets from a marked one.

    Args:
        mask: bool [B, N], N = height * width, raster order.
        offsets_y, offsets_x: the stencil, one (dy, dx) a pair of entries; list (0, 0) to keep the token itself.
        height, width: the patch grid.
        edges: "grid": true neighbours, those off the grid are dropped. "clamp_flat": the raster index
            i + dy * width + dx clamped to [0, N - 1], so that the left neighbour of a row's first patch is the previous
            row's last one.

    Returns:
        bool [B, N].

    Raises:
        ValueError: unknown `edges`, offsets of unequal length, or N != height * width.
    """
    if edges not in EDGES:
        raise ValueError(f"edges must be one of {', '.join(EDGES)}, not {edges!r}")
    if len(offsets_y) != len(offsets_x):
        raise ValueError(f"{len(offsets_y)} offsets_y but {len(offsets_x)} offsets_x")
    if mask.dim() != 2 or mask.dtype != torch.bool or mask.shape[1] != height * width:
        raise ValueError(f"mask must be bool [B, {height}*{width}], not {mask.dtype} {list(mask.shape)}")
    offsets = list(zip(offsets_y, offsets_x, strict=True))
    if not offsets:
        return torch.zeros_like(mask)
    if edges == "grid":
        return _grid(mask, offsets, height, width)
    return _flat(mask, [dy * width + dx for dy, dx in offsets], height * width)


def _shift(mask: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Move the last dimensions of a mask by `steps` (one a dimension, last first), filling with False."""
    sizes = [mask.shape[-1 - i] for i in range(len(steps))]
    steps = tuple(max(-size, min(size, step)) for size, step in zip(sizes, steps, strict=True))
    return F.pad(mask, [side for step in steps for side in (step, -step)], value=False)


def _grid(mask: Tensor, offsets: list[tuple[int, int]], height: int, width: int) -> Tensor:
    plane = mask.reshape(-1, height, width)
    grown = torch.zeros_like(plane)
    for dy, dx in offsets:
        grown = grown | _shift(plane, (dx, dy))
    return grown.reshape(mask.shape)


def _flat(mask: Tensor, steps: list[int], tokens: int) -> Tensor:
    grown = torch.zeros_like(mask)
    for step in steps:
        grown = grown | _shift(mask, (step,))
    # What runs off an end lands on it; the widest step on each side covers the narrower ones.
    before = mask[:, : min(tokens, max(0, -min(steps)))].any(1, keepdim=True)
    after = mask[:, max(0, tokens - max(0, max(steps))) :].any(1, keepdim=True)
    index = torch.arange(tokens, device=mask.device)
    return grown | (before & (index == 0)) | (after & (index == tokens - 1))


dilate = _library.define(
    "dilate(Tensor mask, int[] offsets_y, int[] offsets_x, int height, int width, str edges) -> Tensor", reference
)
