"""tokred::listed_tokens: which rows of a list of flagged tokens are tokens, and no repetitions."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(like: Tensor, flags: Tensor, count: int) -> Tensor:
    """Say which rows of `flagged_tokens(.., flags, like, count)` are flagged tokens of their own.

    Args:
        like: [B, T, C], the tokens. It is not read: an edit that changes them finds the flags by it.
        flags: bool [B, T].
        count: static or symbolic, >= 0.

    Returns:
        bool [B, count]: as many in front of each row as it has flagged tokens, `count` at most.

    Raises:
        ValueError: shapes that do not fit, or flags that are not bool.
    """
    if like.dim() != 3 or flags.dtype != torch.bool or like.shape[:2] != flags.shape:
        raise ValueError(f"{flags.dtype} {list(flags.shape)} are no flags of {list(like.shape)}")
    return torch.arange(count, device=flags.device) < flags.sum(1, keepdim=True)


listed_tokens = _library.define("listed_tokens(Tensor like, Tensor flags, SymInt count) -> Tensor", reference)
