"""tokred::flagged_tokens: the tokens of each row that flags are True for."""

from __future__ import annotations

from torch import Tensor

from . import _library
from .gather_tokens import reference as gather
from .kept_indices import reference as places


def reference(values: Tensor, flags: Tensor, like: Tensor, count: int) -> Tensor:
    """List what flagged tokens have of a value, in their order.

    Args:
        values: [B or 1, T, ...], any dtype.
        flags: bool [B, T].
        like: [B, T, C], the tokens themselves. It is not read: an edit that changes them finds the other two by it.
        count: static or symbolic, >= 0.

    Returns:
        [B, count, ...], dtype of values, contiguous. A row with fewer flagged tokens repeats its last one (its first
        token if none is flagged), a row with more is cut. Differentiable in values.

    Raises:
        ValueError: shapes that do not fit.
    """
    if like.dim() != 3 or like.shape[:2] != flags.shape or values.dim() < 2 or values.shape[1] != flags.shape[1]:
        raise ValueError(f"flags {list(flags.shape)} of {list(like.shape)} choose nothing of {list(values.shape)}")
    return gather(values, places(flags, count), 1, 0)


flagged_tokens = _library.define(
    "flagged_tokens(Tensor values, Tensor flags, Tensor like, SymInt count) -> Tensor", reference
)
