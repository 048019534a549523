"""tokred::key_positions: the position of every cached key, from those of a step's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(positions: Tensor, valid: Tensor | None, key: Tensor) -> Tensor:
    """Count the keys of each row as its last token's position counts them: real tokens alone, or all columns.

    Args:
        positions: int64 [B or 1, T], of the last T keys.
        valid: bool [B, N], real tokens; None: all are.
        key: [B, Hkv, N, D].

    Returns:
        int64 [B, N]. Padding has the position of the real token before it, 0 without one, where real tokens alone
        count.

    Raises:
        ValueError: shapes that do not fit.
    """
    if positions.dim() != 2 or key.dim() != 4 or positions.shape[0] not in (1, key.shape[0]):
        raise ValueError(f"positions must be [B, T] beside keys, not {list(positions.shape)} and {list(key.shape)}")
    batch, tokens = key.shape[0], key.shape[2]
    columns = torch.arange(tokens, device=key.device).expand(batch, tokens)
    if valid is None:
        return columns.clone()
    counted = (valid.to(torch.int64).cumsum(1) - 1).clamp(min=0)
    return torch.where(positions[:, -1:] == counted[:, -1:], counted, columns)


key_positions = _library.define("key_positions(Tensor positions, Tensor? valid, Tensor key) -> Tensor", reference)
