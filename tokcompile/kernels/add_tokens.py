"""tokred::add_tokens: add a vector to each of some tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, flags: Tensor, more: Tensor) -> Tensor:
    """Add the i-th vector of a row to its i-th flagged token; all other tokens stay as they are, to the last bit.

    Args:
        x: [B, T, C], floating point.
        flags: bool [B, T].
        more: [B, M, C]; what is beyond the number of flagged tokens of a row is not used, and where there are more of
            these than M, the others stay as they are.

    Returns:
        [B, T, C], dtype of x, contiguous. Differentiable in x and more.

    Raises:
        ValueError: shapes that do not fit, or flags that are not bool.
    """
    if x.dim() != 3 or flags.dtype != torch.bool or flags.shape != x.shape[:2] or more.dim() != 3:
        raise ValueError(f"{list(more.shape)} cannot be added to {list(x.shape)} at {flags.dtype} {list(flags.shape)}")
    number = flags.cumsum(1) - 1
    # Each token reads its vector, so that no two writes can meet; one row of zeros stands for no vector at all.
    padded = torch.cat([more, more.new_zeros(more.shape[0], 1, more.shape[2])], 1)
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    own = torch.ops.aten.index.Tensor(padded, [row, number.clamp(min=0).clamp(max=more.shape[1])])
    there = flags & (number < more.shape[1])
    return torch.where(there[:, :, None], x + own.to(x.dtype), x).contiguous()


add_tokens = _library.define("add_tokens(Tensor x, Tensor flags, Tensor more) -> Tensor", reference)
