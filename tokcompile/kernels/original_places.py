"""tokred::original_places: where the tokens of a sequence stand after others were put into it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .kept_indices import reference as kept_indices


def reference(fresh: Tensor, like: Tensor) -> Tensor:
    """List the places of the old tokens, in order: gathered by them, the longer sequence is the old one again.

    Args:
        fresh: bool [B, T'], the tokens that were put in: T' - T in each row.
        like: [B, T], any value of the old sequence; only its sizes count.

    Returns:
        int64 [B, T], in [0, T').

    Raises:
        ValueError: fresh is not bool [B, T'], or like not [B, T].
    """
    if fresh.dim() != 2 or fresh.dtype != torch.bool or like.dim() != 2:
        raise ValueError(f"fresh must be bool [B, T'] and like [B, T], not {list(fresh.shape)} and {list(like.shape)}")
    return kept_indices(~fresh, like.shape[1])


original_places = _library.define("original_places(Tensor fresh, Tensor like) -> Tensor", reference)
