"""tokred::merge_weights: what each token counts in the token that it is merged to."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library

MODES = ("average", "sum")


def reference(assigned: Tensor, source: Tensor, mode: str) -> Tensor:
    """Turn an assignment of tokens to slots into the weights of their mean.

    Args:
        assigned: int64 [B, T], the slot of each token in [0, S), -1 for tokens of no slot.
        source: int64 [B, S], the token that stands for each slot, itself assigned to the slot.
        mode: `average`, the mean of a slot's tokens; or `sum`, the slot's source token plus the mean of its others.

    Returns:
        float32 [B, S, T], for `mix_tokens`. Rows sum to 1 in mode `average` (0 where a slot has no token), and in mode
        `sum` to 2, or to 1 where a slot has no token beside its source.

    Raises:
        ValueError: wrong ranks, or an unknown mode.
    """
    if assigned.dim() != 2 or source.dim() != 2:
        raise ValueError(f"assigned must be [B, T] and source [B, S], not {list(assigned.shape)}, {list(source.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    slots = torch.arange(source.shape[1], device=assigned.device)
    member = assigned.unsqueeze(1) == slots[:, None]
    if mode == "average":
        return _mean(member)
    itself = source.unsqueeze(2) == torch.arange(assigned.shape[1], device=assigned.device)
    return itself.to(torch.float32) + _mean(member & ~itself)


def _mean(member: Tensor) -> Tensor:
    """Weights of the mean over the tokens of each slot, bool [B, S, T]."""
    return member.to(torch.float32) / member.sum(2, keepdim=True).clamp(min=1)


merge_weights = _library.define("merge_weights(Tensor assigned, Tensor source, str mode) -> Tensor", reference)
