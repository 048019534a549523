"""attend_chosen: attention to keys that are listed, read where they are; a kernel alone, which no pass inserts."""

from __future__ import annotations

from torch import Tensor

from . import _library
from .attend import reference as attend
from .gather_keys import reference as gather_keys
from .gather_mask import reference as gather_mask


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    index: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Gather keys, values and the columns of a mask, and attend to them.

    Args:
        query, scale, softcap, sinks: as for `attend`.
        key, value: [B, Hkv, N, D] and [B, Hkv, N, Dv].
        mask: as for `gather_mask`; None.
        index: as for `gather_keys`.

    Returns:
        [B, H, Tq, Dv], of the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit.
    """
    seen = None if mask is None else gather_mask(mask, index)
    return attend(query, gather_keys(key, index), gather_keys(value, index), seen, scale, softcap, sinks)


_library.define_kernel(
    "attend_chosen(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor index, float scale, float softcap, "
    "Tensor? sinks=None) -> Tensor",
    reference,
    triton="triton_attend_chosen",
)
