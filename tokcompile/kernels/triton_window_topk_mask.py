"""The Triton part of window_topk_mask: a program for each window."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _triton_select as select
from ._triton_windows import mark


def supports(scores: Tensor, height: int, width: int, rows: int, columns: int, k: Any) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    del k
    size = (height // rows) * (width // columns)
    if size > select.MOST:
        return f"windows of {size} tokens; the kernel holds {select.MOST}"
    return select.fault(scores, size)


def launch(scores: Tensor, height: int, width: int, rows: int, columns: int, k: Any) -> Tensor:
    """As the reference."""
    return mark(scores, None, (height // rows, width // columns), (rows, columns), k)
