"""tokred::first_members: one token for each slot of an assignment."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(assigned: Tensor, count: int) -> Tensor:
    """Name the first token of each slot.

    Args:
        assigned: int64 [B, T], the slot of each token in [0, count), -1 for tokens of no slot.
        count: number of slots, static or symbolic.

    Returns:
        int64 [B, count]; 0 for a slot without tokens.

    Raises:
        ValueError: assigned is not two-dimensional.
    """
    if assigned.dim() != 2:
        raise ValueError(f"assigned must be [B, T], not {list(assigned.shape)}")
    slots = torch.arange(count, device=assigned.device)
    # argmax of a mask is its first True, and 0 without any.
    return (assigned.unsqueeze(1) == slots[:, None]).to(torch.int32).argmax(2)


first_members = _library.define("first_members(Tensor assigned, SymInt count) -> Tensor", reference)
