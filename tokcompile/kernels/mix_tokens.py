"""tokred::mix_tokens: new tokens as linear combinations of old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, source: Tensor, weights: Tensor) -> Tensor:
    """Combine the T tokens of each row to T' new ones: `out[b, i] = sum over t of weights[b, i, t] * x[b, t]`.

    Every old token enters the product, with weight 0 as well: one that is infinite or NaN makes all new tokens NaN.

    Args:
        x: float [B, T, C].
        source: int64 [B or 1, T'], the old token that each new one stands for. It does not change the result: it tells
            axis inference what the new axis was made from.
        weights: float [B or 1, T', T]; one row is shared by all rows of x.

    Returns:
        [B, T', C], x's dtype; accumulated in float32, or in the wider of both dtypes.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.dim() != 3 or source.dim() != 2 or weights.dim() != 3:
        raise ValueError(
            "x must be [B, T, C], source [B, T'] and weights [B, T', T], not "
            f"{list(x.shape)}, {list(source.shape)} and {list(weights.shape)}"
        )
    torch._check_value(
        weights.shape[2] == x.shape[1] and weights.shape[1] == source.shape[1],
        lambda: f"weights {list(weights.shape)} do not lead from {x.shape[1]} tokens to {source.shape[1]}",
    )
    dtype = torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32)
    return torch.matmul(weights.to(dtype), x.to(dtype)).to(x.dtype)


mix_tokens = _library.define("mix_tokens(Tensor x, Tensor source, Tensor weights) -> Tensor", reference)
