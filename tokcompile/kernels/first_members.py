"""tokred::first_members: one token for each slot of an assignment."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .kept_indices import reference as kept_indices


def reference(assigned: Tensor, count: int) -> Tensor:
    """Name the first token of each slot, and for slots without tokens some of the others: no token twice in a row.

    Args:
        assigned: int64 [B, T], the slot of each token in [0, count), -1 for tokens of no slot.
        count: number of slots, at most T; static or symbolic.

    Returns:
        int64 [B, count]. Slots without tokens get, in their order, the tokens that are first in no slot.

    Raises:
        ValueError: assigned is not two-dimensional, or there are more slots than tokens.
    """
    if assigned.dim() != 2:
        raise ValueError(f"assigned must be [B, T], not {list(assigned.shape)}")
    torch._check_value(count <= assigned.shape[1], lambda: f"{count} slots of {assigned.shape[1]} tokens")
    slots = torch.arange(count, device=assigned.device)
    member = assigned.unsqueeze(1) == slots[:, None]
    # argmax of a mask is its first True.
    first, held = member.to(torch.int32).argmax(2), member.any(2)
    is_first = (member & (member.cumsum(2) == 1)).any(1)
    spare = kept_indices(~is_first, count)
    return torch.where(held, first, spare.gather(1, ((~held).cumsum(1) - 1).clamp(min=0)))


first_members = _library.define("first_members(Tensor assigned, SymInt count) -> Tensor", reference)
