"""tokred::key_viewers: how many queries see each key."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library
from .key_attention import seeing, windowed


def reference(
    query: Tensor, key: Tensor, mask: Tensor | None, valid: Tensor | None, window: int, is_causal: bool
) -> Tensor:
    """Count the queries of real tokens that see a key.

    Args:
        query: [B, H, Tq, D]; only its shape matters, as that of `key`.
        key: [B, Hkv, Tk, D].
        mask, valid, window, is_causal: as for `key_attention`.

    Returns:
        float32 [B, Tk].

    Raises:
        ValueError: shapes that do not fit.
    """
    check(query, key, mask, valid)
    hidden = None if mask is None else _attention.four_d(mask)
    if window:
        query, hidden, valid = windowed(query, key.shape[2], hidden, valid, window, is_causal)
        is_causal = False
    counted = torch.ones_like(query[:, 0, :, 0], dtype=torch.bool) if valid is None else valid
    return seeing(counted, key.shape[2], hidden, is_causal).expand(query.shape[0], key.shape[2]).contiguous()


def check(query: Tensor, key: Tensor, mask: Tensor | None, valid: Tensor | None) -> None:
    """Refuse arguments of the operator that do not fit. Raises ValueError."""
    _attention.check(query, key, mask, "mean")
    if valid is not None and (valid.dim() != 2 or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool [B, Tq], not {valid.dtype} {list(valid.shape)}")


key_viewers = _library.define(
    "key_viewers(Tensor query, Tensor key, Tensor? mask, Tensor? valid, int window, bool is_causal) -> Tensor",
    reference,
    triton="triton_key_viewers",
)
