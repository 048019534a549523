"""tokred::merge_pairs: add tokens to others, each weighed by the number of tokens that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, size: Tensor | None, source: Tensor, given: Tensor, into: Tensor, mean: bool) -> Tensor:
    """Merge some tokens into others that stay.

    Args:
        x: [B, T, C].
        size: float [B, T], how many tokens each stands for; None for one each.
        source: int64 [B, T'], the tokens that stay.
        given: int64 [B, M], the tokens that are merged.
        into: int64 [B, M], the place in `source` of the token that each is merged into.
        mean: the mean weighed by size, else the sum weighed by size.

    Returns:
        [B, T', C] in x's dtype; sums of half precision are made in float32.

    Raises:
        ValueError: x is not [B, T, C].
    """
    check(x)
    dtype = x.dtype
    wide = x if dtype == torch.float64 else x.to(torch.float32)
    size = x.new_ones(x.shape[:2], dtype=wide.dtype) if size is None else size.to(wide.dtype)
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    own, other = size[row, source], size[row, given]
    # A product with zeros and ones adds in a fixed order on every device, which a scatter does not.
    slots = torch.arange(source.shape[1], device=x.device)
    share = (into[:, None, :] == slots[:, None]).to(wide.dtype) * other[:, None, :]
    total = wide[row, source] * own[:, :, None] + share @ wide[row, given]
    if mean:
        total = total / (own + share.sum(-1))[:, :, None]
    return total.to(dtype)


def check(x: Tensor) -> None:
    """Refuse tokens of another rank. Raises ValueError."""
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], not {list(x.shape)}")


merge_pairs = _library.define(
    "merge_pairs(Tensor x, Tensor? size, Tensor source, Tensor given, Tensor into, bool mean) -> Tensor",
    reference,
    triton="triton_merge_pairs",
)
