"""tokred::end_places: where the first and the last real tokens of each row stand."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(like: Tensor, valid: Tensor | None, lead: int, count: int) -> Tensor:
    """List places of tokens: the first `lead` real ones of a row and then the last `count` - `lead`.

    Args:
        like: [B, T], any value of the sequence; only its sizes and device count.
        valid: bool [B, T], real tokens; None: all are.
        lead, count: 0 <= lead <= count. Where a row has fewer, its last one stands for those missing behind, and its
            first one for those missing in front; the two parts may overlap.

    Returns:
        int64 [B, count], in [0, T).

    Raises:
        ValueError: like is not [B, T], or lead and count do not fit.
    """
    if like.dim() != 2 or not 0 <= lead <= count:
        raise ValueError(f"like must be [B, T] and 0 <= lead <= count, not {list(like.shape)}, {lead} and {count}")
    batch, tokens = like.shape
    index = torch.arange(tokens, device=like.device).expand(batch, tokens)
    rank = index + 1 if valid is None else valid.cumsum(1)
    slot = rank - 1 if valid is None else torch.where(valid, rank - 1, tokens)
    places = index.new_zeros(batch, tokens + 1).scatter(1, slot, index)
    number, total = torch.arange(count, device=like.device).expand(batch, count), rank[:, -1:]
    from_front = torch.minimum(number, total - 1)
    return places.gather(1, torch.where(number < lead, from_front, total - count + number).clamp(min=0))


end_places = _library.define("end_places(Tensor like, Tensor? valid, int lead, int count) -> Tensor", reference)
