"""tokred::mean_query: the mean of a step's queries, for each head."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(query: Tensor, valid: Tensor | None) -> Tensor:
    """Average the queries of real tokens.

    Args:
        query: float [B, H, T, D].
        valid: bool [B, N], N >= T: real tokens of each row, of which the last T are the queries'; None: all are real.

    Returns:
        float32 [B, H, D]; zeros for a row whose queries are all padding.

    Raises:
        ValueError: shapes that do not fit, or `valid` is not bool.
    """
    if query.dim() != 4:
        raise ValueError(f"query must be [B, H, T, D], not {list(query.shape)}")
    if valid is None:
        return query.to(torch.float32).mean(2)
    if valid.dim() != 2 or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool [B, N], not {valid.dtype} {list(valid.shape)}")
    counted = valid[:, valid.shape[1] - query.shape[2] :].to(torch.float32)
    total = (query.to(torch.float32) * counted[:, None, :, None]).sum(2)
    return total / counted.sum(1).clamp(min=1)[:, None, None]


mean_query = _library.define("mean_query(Tensor query, Tensor? valid) -> Tensor", reference)
