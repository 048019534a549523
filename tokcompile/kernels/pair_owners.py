"""tokred::pair_owners: whose key each slot of a cache holds that was chosen over all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(pairs: Tensor, valid: Tensor | None, tokens: int) -> Tensor:
    """Read the head of each pair, where its token is real.

    Args:
        pairs: int64 [B, H, k], head * tokens + token.
        valid: bool [B, tokens], real tokens; None: all are.
        tokens: how many there were before the choice.

    Returns:
        int64 [B, H, k]: the head, or -1 for padding.

    Raises:
        ValueError: shapes that do not fit.
    """
    if pairs.dim() != 3 or (valid is not None and (valid.dim() != 2 or valid.dtype != torch.bool)):
        raise ValueError(f"pairs must be [B, H, k] and valid bool [B, T], not {list(pairs.shape)} and {valid}")
    heads = pairs // tokens
    if valid is None:
        return heads
    real = valid.gather(1, (pairs % tokens).flatten(1)).reshape(pairs.shape)
    return torch.where(real, heads, -1)


pair_owners = _library.define("pair_owners(Tensor pairs, Tensor? valid, SymInt tokens) -> Tensor", reference)
