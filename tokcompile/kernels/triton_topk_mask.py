"""The Triton part of topk_mask: a row is one window, or is read in parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _triton_long_rows as long_rows
from . import _triton_select as select
from ._triton_windows import mark


def supports(scores: Tensor, among: Tensor | None, k: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del among, k
    return select.fault(scores, scores.shape[1])


def launch(scores: Tensor, among: Tensor | None, k: Any) -> Tensor:
    """As the reference."""
    if scores.shape[1] > select.MOST:
        return long_rows.select(scores[:, None], among, 0, 0, k, indices=False)[:, 0]
    return mark(scores, among, (1, scores.shape[1]), (1, 1), k)
