"""tokred::reuse_keys: a new choice of keys, or the one of an earlier step with the keys that have come since."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(held: Tensor, new: Tensor, again: Tensor, last: int) -> Tensor:
    """Take the earlier choice in those rows that say so; the last keys are those of the new choice in any case.

    Args:
        held: int64 [B, G, S], an earlier choice without its last keys.
        new: int64 [B, G, k], ascending; its last ones are the last keys of each row. k - last <= S.
        again: bool [B].
        last: how many the last keys are.

    Returns:
        int64 [B, G, k].

    Raises:
        ValueError: shapes that do not fit.
    """
    if held.dim() != 3 or new.dim() != 3 or held.shape[:2] != new.shape[:2] or again.dtype != torch.bool:
        raise ValueError(
            f"held, new and again must be [B, G, S], [B, G, k] and bool [B], not {list(held.shape)}, "
            f"{list(new.shape)} and {again.dtype}"
        )
    early = new.shape[2] - last
    chosen = torch.where(again[:, None, None], held[:, :, :early], new[:, :, :early])
    return torch.cat([chosen, new[:, :, early:]], 2)


reuse_keys = _library.define("reuse_keys(Tensor held, Tensor new, Tensor again, SymInt last) -> Tensor", reference)
