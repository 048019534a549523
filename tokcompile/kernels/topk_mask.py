"""tokred::topk_mask: the k best-scored tokens of each row, as a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _order


def reference(scores: Tensor, among: Tensor | None, k: int) -> Tensor:
    """Mark the k tokens of each row with the largest scores.

    Args:
        scores: real [B, N], compared as float32.
        among: bool [B, N] or None; tokens outside it are chosen only when fewer than k are inside, lowest index first.
        k: static or symbolic, 0 <= k <= N.

    Returns:
        bool [B, N] with exactly k True in each row. Ties go to the lowest index; NaN ranks below -inf.

    Raises:
        ValueError: wrong rank or mask dtype. RuntimeError: k out of range.
    """
    _order.check_rows(scores, [] if among is None else [among])
    allowed = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    return _order.largest(_order.pack(allowed.to(torch.int64), scores, allowed), k)


topk_mask = _library.define(
    "topk_mask(Tensor scores, Tensor? among, SymInt k) -> Tensor", reference, triton="triton_topk_mask"
)
