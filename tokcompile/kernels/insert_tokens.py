"""tokred::insert_tokens: put other tokens into a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, source: Tensor, fresh: Tensor, tokens: Tensor) -> Tensor:
    """Build the longer sequence: old tokens as they are, and the new ones in turn where `fresh` says.

    Args:
        x: [B, T, C], floating point.
        source: int64 [B, T'], the old token at each place; what it says of a new one is not used.
        fresh: bool [B, T'], the places of new tokens.
        tokens: [B or 1, M, C], the new tokens in their order; the last one stands for all that are missing, so that
            one is enough for all places.

    Returns:
        [B, T', C], dtype of x, contiguous. Differentiable in x and tokens.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 3 or tokens.dim() != 3 or source.shape != fresh.shape or tokens.shape[2] != x.shape[2]:
        raise ValueError(f"tokens {list(tokens.shape)} cannot be put into {list(x.shape)} at {list(fresh.shape)}")
    batch, width = x.shape[0], x.shape[2]
    number = (fresh.cumsum(1) - 1).clamp(0, tokens.shape[1] - 1)
    rows = torch.arange(batch, device=x.device)[:, None]
    old = torch.ops.aten.index.Tensor(x, [rows, source])
    new = torch.ops.aten.index.Tensor(tokens.expand(batch, tokens.shape[1], width), [rows, number])
    return torch.where(fresh[:, :, None], new.to(x.dtype), old).contiguous()


insert_tokens = _library.define(
    "insert_tokens(Tensor x, Tensor source, Tensor fresh, Tensor tokens) -> Tensor", reference
)
