"""tokred::strided_tokens: evenly spaced tokens of a group."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .kept_indices import reference as kept_indices


def reference(among: Tensor, count: int) -> Tensor:
    """List the tokens of rank 0, step, 2 * step, ... of a group of n, where step is max(1, n // count).

    Args:
        among: bool [B, T], the group; rows may differ in n. The caller guarantees n >= count in each row.
        count: static or symbolic, >= 1.

    Returns:
        int64 [B, count], ascending. A row with n < count lists its n tokens and repeats the last one.

    Raises:
        ValueError: among is not bool [B, T], or count < 1.
    """
    if among.dim() != 2 or among.dtype != torch.bool:
        raise ValueError(f"among must be bool [B, T], not {among.dtype} {list(among.shape)}")
    torch._check_value(count >= 1, lambda: f"cannot space {count} tokens evenly")
    rank = among.cumsum(1) - 1
    step = (among.sum(1, keepdim=True) // count).clamp(min=1)
    return kept_indices(among & (rank % step == 0) & (rank < step * count), count)


strided_tokens = _library.define("strided_tokens(Tensor among, SymInt count) -> Tensor", reference)
