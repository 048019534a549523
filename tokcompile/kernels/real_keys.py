"""tokred::real_keys: which keys of each row are real tokens, read from an attention's mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library


def reference(mask: Tensor, key: Tensor) -> Tensor:
    """Return what the last query of each row sees, which is every real token of it.

    Args:
        mask: bool (True is seen) or additive float, broadcastable to [B, H, Tq, N].
        key: [B, Hkv, N, D].

    Returns:
        bool [B, N].

    Raises:
        ValueError: shapes that do not fit.
    """
    if key.dim() != 4 or not 2 <= mask.dim() <= 4:
        raise ValueError(f"mask and key must be [B, H, Tq, N] and [B, Hkv, N, D], not {list(mask.shape)}")
    row = _attention.four_d(mask)[:, 0, -1]
    seen = row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
    return seen.expand(key.shape[0], key.shape[2])


real_keys = _library.define("real_keys(Tensor mask, Tensor key) -> Tensor", reference)
