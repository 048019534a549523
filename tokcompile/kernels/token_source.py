"""tokred::token_source: indices into a sequence as the token map that makes a new sequence of it."""

from __future__ import annotations

from torch import Tensor

from . import _library


def reference(index: Tensor, like: Tensor) -> Tensor:
    """Say of which sequence some indices are tokens; what is gathered by the result is known to come from there.

    Args:
        index: int64 [B, T'], the old token that each new one stands for, in any order.
        like: [B, T], any value of the old sequence; only its second dimension counts.

    Returns:
        The indices, contiguous.

    Raises:
        ValueError: index or like is not two-dimensional.
    """
    if index.dim() != 2 or like.dim() != 2:
        raise ValueError(f"index must be [B, T'] and like [B, T], not {list(index.shape)} and {list(like.shape)}")
    return index.clone()


token_source = _library.define("token_source(Tensor index, Tensor like) -> Tensor", reference)
