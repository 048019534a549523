"""mark_pack: a marked sequence and what stands in its slots, at once; a kernel alone, which no pass inserts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import _library
from .mark_slots import reference as mark_slots
from .mark_tokens import reference as mark_tokens
from .slot_means import reference as slot_means


def reference(x: Tensor, runs: Tensor, length: Any, content: Tensor | None, means: bool) -> list[Tensor]:
    """List the slots of a sequence in which each run of tokens becomes one, and fill them.

    Args:
        x: float [B, T, C].
        runs, length: as for `mark_slots`.
        content: as for `mark_tokens`.
        means: whether new tokens are the means of their runs, as of `slot_means`; content is then None. In a row with
            more tokens than slots, which the caller refuses, the mean of the first slot is not defined.

    Returns:
        The tokens, [B, length, C] in x's dtype, and the slots, int64 [B, length].

    Raises:
        ValueError: shapes that do not fit.
    """
    slots = mark_slots(runs, length)
    return [mark_tokens(x, slots, slot_means(x, slots) if means else content), slots]


_library.define_kernel(
    "mark_pack(Tensor x, Tensor runs, SymInt length, Tensor? content, bool means) -> Tensor[]",
    reference,
    triton="triton_mark_pack",
)
