"""tokred::seen_keys: the mask of a step's queries over all keys, made of the caller's two-dimensional one."""

from __future__ import annotations

from torch import Tensor

from . import _library
from .attention import seen_keys as seen


def reference(padding: Tensor, query: Tensor, key: Tensor, is_causal: bool) -> Tensor:
    """Say which keys each query sees.

    Args:
        padding: bool or int [B, M], nonzero for real tokens. Its first N columns are the keys'; keys beyond M are real.
        query: [B, H, Tq, D].
        key: [B, Hkv, N, D].
        is_causal: each query sees the keys up to its own place, the last query being the last key.

    Returns:
        bool [B, 1, Tq or 1, N]: True is seen; 1 row where all queries see the same.
    """
    return seen(padding, query.shape[-2], key.shape[-2], is_causal)


seen_keys = _library.define("seen_keys(Tensor padding, Tensor query, Tensor key, bool is_causal) -> Tensor", reference)
