"""gather_many: gathers of several values by one index, in one launch. It is a kernel alone, which no pass inserts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from . import _library
from .gather_keys import reference as keys
from .gather_mask import reference as mask
from .gather_pairs import reference as pairs
from .gather_tokens import reference as tokens

FORMS: tuple[Callable[..., Tensor], ...] = (tokens, keys, mask, pairs)


def reference(values: Sequence[Tensor], index: Tensor, forms: Sequence[int]) -> list[Tensor]:
    """Gather each value as the op of its form does.

    Args:
        values: up to four; see the op of each form.
        index: one for all; see there.
        forms: for each value three numbers: 0 for gather_tokens, 1 for gather_keys, 2 for gather_mask, 3 for
            gather_pairs; then `dim` and `batch_dim` of gather_tokens, 0 for the others.

    Returns:
        What the ops return.
    """
    made = []
    for value, form, dim, batch in zip(values, forms[::3], forms[1::3], forms[2::3], strict=True):
        made.append(FORMS[form](value, index, *((dim, batch) if form == 0 else ())))
    return made


_library.define_kernel(
    "gather_many(Tensor[] values, Tensor index, int[] forms) -> Tensor[]", reference, triton="triton_gather_many"
)
