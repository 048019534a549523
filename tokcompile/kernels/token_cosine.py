"""tokred::token_cosine: how alike each token is to a reference vector."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def _unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length one; zero vectors stay zero."""
    # Dividing by the largest entry first keeps the squares of very small and very large vectors in range.
    peak = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(peak == 0, 1.0, peak)
    norm = torch.linalg.vector_norm(scaled, 2.0, dim=-1, keepdim=True)
    return scaled / torch.where(norm == 0, 1.0, norm)


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
    mean = _unit(several.to(torch.float32)).mean(1, keepdim=True)
    return (_unit(x.to(torch.float32)) * mean).sum(-1)


token_cosine = _library.define("token_cosine(Tensor x, Tensor reference) -> Tensor", reference)
