"""tokred::cluster_slots: a table of so many members of each cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _distance, _library


def reference(x: Tensor, centres: Tensor, labels: Tensor, slots: int) -> Tensor:
    """List members of each cluster, the nearest to its centre first and lower indices before higher.

    PPE (MouxiaoHuang/PPE at 7b6aa7d), the choice of slots as its paper has it: slot k is member k mod n of n.

    Args:
        x: real [B, T, C], compared as float32.
        centres: int64 [B, M], the token in the middle of each cluster.
        labels: int64 [B, T], the cluster of each token, in [0, M). A cluster without members lists its centre.
        slots: at least 1.

    Returns:
        int64 [B, M, slots], token indices; a cluster of fewer members lists them again and again.

    Raises:
        ValueError: other ranks, or no slot.
    """
    if x.dim() != 3 or centres.dim() != 2 or labels.shape != x.shape[:2]:
        raise ValueError(
            "x must be [B, T, C], centres [B, M] and labels [B, T], not "
            f"{list(x.shape)}, {list(centres.shape)} and {list(labels.shape)}"
        )
    if slots < 1:
        raise ValueError(f"a cluster has at least one slot, not {slots}")
    tokens = x.shape[1]
    apart = _distance.distances(x.gather(1, centres.unsqueeze(2).expand(-1, -1, x.shape[2])), x)
    apart = apart.gather(1, labels.unsqueeze(1)).squeeze(1)
    # Stable sorts by the lesser key first: by index as they stand, then by distance, then by cluster.
    order = apart.argsort(dim=1, stable=True)
    order = order.gather(1, labels.gather(1, order).argsort(dim=1, stable=True))
    number = torch.arange(centres.shape[1], device=x.device)
    count = (labels.unsqueeze(1) == number.unsqueeze(1)).sum(2, keepdim=True)
    first = count.cumsum(1) - count
    turn = torch.arange(slots, device=x.device) % count.clamp(min=1)
    member = order.gather(1, (first + turn).clamp(max=tokens - 1).flatten(1)).reshape(turn.shape)
    return torch.where(count > 0, member, centres.unsqueeze(2))


cluster_slots = _library.define(
    "cluster_slots(Tensor x, Tensor centres, Tensor labels, int slots) -> Tensor", reference
)
