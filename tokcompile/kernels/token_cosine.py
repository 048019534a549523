"""tokred::token_cosine: how alike each token is to a reference vector."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _vectors


def reference(x: Tensor, reference: Tensor) -> Tensor:
    """Cosine similarity of every token to the reference of its row, or the mean over several references.

    Args:
        x: real [B, T, C].
        reference: real [B, C] or [B, R, C]; B may be 1.

    Returns:
        float32 [B, T]; a zero vector on either side counts as 0.

    Raises:
        ValueError: other ranks, or C differs.
    """
    if x.dim() != 3 or reference.dim() not in (2, 3) or x.shape[-1] != reference.shape[-1]:
        raise ValueError(
            f"x must be [B, T, C] and reference [B, C] or [B, R, C], not {list(x.shape)} and {list(reference.shape)}"
        )
    several = reference if reference.dim() == 3 else reference.unsqueeze(1)
    # The mean of dot products is the dot product with the mean: R costs nothing per token.
    mean = _vectors.unit(several.to(torch.float32)).mean(1, keepdim=True)
    return (_vectors.unit(x.to(torch.float32)) * mean).sum(-1)


token_cosine = _library.define("token_cosine(Tensor x, Tensor reference) -> Tensor", reference)
