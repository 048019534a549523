"""tokred::turn_keys: keys of a cache turned by further rotary positions, for each head its own."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(cache: Tensor, by: Tensor, inverse: Tensor, neighbours: bool) -> Tensor:
    """Turn keys that stand at rotary positions p as if they stood at p + by.

    Rotations add up: rotate(k, p) turned by d is rotate(k, p + d). Angles are float32.

    Args:
        cache: float [B, H, T, D], keys after their rotation.
        by: integer or float [B, H or 1, T], positions.
        inverse: float [P], or [B, P] for each row, angle per position of each pair, 2 P <= D; numbers beyond the first
            2 P are not turned.
        neighbours: whether numbers 2 i and 2 i + 1 are a pair, and not i and i + P.

    Returns:
        [B, H, T, D], of the dtype of `cache`.

    Raises:
        ValueError: shapes that do not fit.
    """
    if cache.dim() != 4 or by.dim() != 3 or not _fits(inverse, cache.shape[3]):
        raise ValueError(
            f"cache, by and inverse must be [B, H, T, D], [B, H, T] and [P], not {list(cache.shape)}, {list(by.shape)} "
            f"and {list(inverse.shape)}"
        )
    each = inverse if inverse.dim() == 1 else inverse[:, None, None]
    angles = by.to(torch.float32)[..., None] * each.to(torch.float32)
    cos, sin = angles.cos(), angles.sin()
    pairs = inverse.shape[-1]
    turned, rest = cache[..., : 2 * pairs].to(torch.float32), cache[..., 2 * pairs :]
    if neighbours:
        one, two = turned[..., ::2], turned[..., 1::2]
    else:
        one, two = turned[..., :pairs], turned[..., pairs:]
    parts = (one * cos - two * sin, two * cos + one * sin)
    whole = torch.stack(parts, -1).flatten(-2) if neighbours else torch.cat(parts, -1)
    return torch.cat([whole.to(cache.dtype), rest], -1)


def _fits(inverse: Tensor, width: int) -> bool:
    return inverse.dim() in (1, 2) and 2 * inverse.shape[-1] <= width


turn_keys = _library.define("turn_keys(Tensor cache, Tensor by, Tensor inverse, bool neighbours) -> Tensor", reference)
