"""tokred::token_norm: the length of each token's vector."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, p: float) -> Tensor:
    """The p-norm of every token.

    Args:
        x: real [B, T, C].
        p: 1, 2 or inf.

    Returns:
        float32 [B, T], accumulated in float32.

    Raises:
        ValueError: another p or rank.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], not {list(x.shape)}")
    if p not in (1.0, 2.0, float("inf")):
        raise ValueError(f"p must be 1, 2 or inf, not {p}")
    return torch.linalg.vector_norm(x.to(torch.float32), p, dim=-1)


token_norm = _library.define("token_norm(Tensor x, float p) -> Tensor", reference)
