"""tokred::inserted_source: the token map of a sequence that other tokens are put into."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(fresh: Tensor, like: Tensor, first: Tensor | None) -> Tensor:
    """Give each token of the longer sequence an old one: itself, or for one that is put in the one before it.

    Args:
        fresh: bool [B, T'], the tokens that are put in: T' - T in each row.
        like: [B, T], any value of the old sequence; only its sizes count.
        first: int64 [B], the first real token of each row, which stands for tokens that are put in before it; None
            for 0.

    Returns:
        int64 [B, T'], in [0, T).

    Raises:
        ValueError: fresh is not bool [B, T'], or like not [B, T].
    """
    if fresh.dim() != 2 or fresh.dtype != torch.bool or like.dim() != 2:
        raise ValueError(f"fresh must be bool [B, T'] and like [B, T], not {list(fresh.shape)} and {list(like.shape)}")
    before = (~fresh).cumsum(1) - 1
    lowest = torch.zeros_like(before[:, :1]) if first is None else first[:, None]
    return torch.where(fresh, torch.maximum(before, lowest), before.clamp(min=0))


inserted_source = _library.define("inserted_source(Tensor fresh, Tensor like, Tensor? first) -> Tensor", reference)
