"""tokred::matching_tokens: the tokens of a sequence that are one of some vectors."""

from __future__ import annotations

from torch import Tensor

from . import _library


def reference(x: Tensor, vectors: Tensor) -> Tensor:
    """Say which tokens equal one of some vectors in every number.

    Args:
        x: [B, T, C], any dtype.
        vectors: [M, C].

    Returns:
        bool [B, T]. A token with a NaN equals nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 3 or vectors.dim() != 2 or x.shape[2] != vectors.shape[1]:
        raise ValueError(f"{list(vectors.shape)} are no vectors of tokens {list(x.shape)}")
    return (x[:, :, None] == vectors).all(-1).any(-1)


matching_tokens = _library.define("matching_tokens(Tensor x, Tensor vectors) -> Tensor", reference)
