"""tokred::inverse_map: where each old token of a merge went."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(source: Tensor, given: Tensor, into: Tensor, like: Tensor) -> Tensor:
    """Number the new tokens by the old ones that they hold.

    Args:
        source: int64 [B, T'], tokens that stay.
        given: int64 [B, M], tokens that are merged.
        into: int64 [B, M], for each the place in `source` that it is merged into.
        like: [B, T], any value of the old sequence.

    Returns:
        int64 [B, T]: for each old token the new one that holds it. A token in neither list gets 0.
    """
    slots = torch.arange(source.shape[1], device=source.device).expand(source.shape)
    empty = torch.zeros(like.shape, dtype=torch.int64, device=source.device)
    return empty.scatter(1, source, slots).scatter(1, given, into)


inverse_map = _library.define("inverse_map(Tensor source, Tensor given, Tensor into, Tensor like) -> Tensor", reference)
