"""tokred::token_distances: how far apart each two tokens of a row are."""

from __future__ import annotations

from torch import Tensor

from . import _library, _vectors


def reference(x: Tensor) -> Tensor:
    """One minus the cosine of each two tokens: from 0 for one direction to 2 for opposite ones.

    DivPrune (Alvar et al. 2025), section 3.1. Products are added up in float64, so that equal tokens are ties.

    Args:
        x: real [B, T, C], computed in float32 whatever the dtype. A zero vector is 1 from all.

    Returns:
        float32 [B, T, T].

    Raises:
        ValueError: x is not [B, T, C].
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], not {list(x.shape)}")
    return 1 - _vectors.cosines(x, x)


token_distances = _library.define("token_distances(Tensor x) -> Tensor", reference)
