"""tokred::fill_mask: an exact budget filled from priority groups first, then by score."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _order


def reference(first: list[Tensor], scores: Tensor, among: Tensor | None, k: int) -> Tensor:
    """Mark exactly k tokens of each row: those of first[0], then first[1], ..., then the best-scored rest.

    Args:
        first: bool [B, N] each, in falling priority; a token in several counts in the earliest. May be empty.
        scores: real [B, N], compared as float32; they also decide inside a group that overflows the budget.
        among: bool [B, N] or None: which tokens may be taken by score. Groups in `first` are not limited by it; tokens
            outside both are taken last, lowest index first.
        k: static or symbolic, 0 <= k <= N.

    Returns:
        bool [B, N] with exactly k True in each row; ties go to the lowest index.

    Raises:
        ValueError: wrong rank or mask dtype, or more than 125 groups. RuntimeError: k out of range.
    """
    _order.check_rows(scores, [*first, *([] if among is None else [among])])
    if len(first) + 2 > _order.MAX_CLASSES:
        raise ValueError(f"at most {_order.MAX_CLASSES - 2} priority groups, not {len(first)}")
    allowed = torch.ones_like(scores, dtype=torch.bool) if among is None else among
    classes = allowed.to(torch.int64)
    for rank, group in enumerate(reversed(first)):
        classes = torch.where(group, rank + 2, classes)
    return _order.largest(_order.pack(classes, scores, classes > 0), k)


fill_mask = _library.define(
    "fill_mask(Tensor[] first, Tensor scores, Tensor? among, SymInt k) -> Tensor", reference, triton="triton_fill_mask"
)
