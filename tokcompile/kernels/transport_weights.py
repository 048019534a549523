"""tokred::transport_weights: a plan of transport as the weights of a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library

NORMALISE = ("plan", "row")


def reference(plan: Tensor, keep: Tensor, among: Tensor | None, normalise: str) -> Tensor:
    """What each kept token is made of: itself and its shares, divided by one and their sum.

    AOT (TyroneLi/AOT at 88455ee, `llava_arch.py`): a' = (a + P^T x) / (1 + the sum of a's shares).

    Args:
        plan: float [B, n, M], the share of each dropped token in each kept one.
        keep: bool [B, T], T = n + M, with n True in each row; kept and dropped tokens are numbered in its order.
        among: bool [B, T]: the dropped tokens that are merged, all others vanish; None for all.
        normalise: `plan`: shares as they are, each kept token's sum to 1 / n and move it little. `row`: shares of each
            dropped token are scaled to sum to 1, so that all of it arrives; AOT's transport between frames.

    Returns:
        float32 [B, n, T], for `mix_tokens`; the weights of each new token sum to 1. A kept token gives to itself alone.

    Raises:
        ValueError: another rank or dtype, or unknown `normalise`.
    """
    if normalise not in NORMALISE:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISE)}, not {normalise!r}")
    if plan.dim() != 3 or keep.dim() != 2 or keep.dtype != torch.bool:
        raise ValueError(
            f"plan must be [B, n, M] and keep bool [B, T], not {list(plan.shape)} and {keep.dtype} {list(keep.shape)}"
        )
    plan = plan.to(torch.float32)
    if normalise == "row":
        total = plan.sum(1, keepdim=True)
        plan = plan / torch.where(total == 0, 1.0, total)
    rank = keep.cumsum(1) - 1
    number = torch.arange(plan.shape[1], device=plan.device)
    itself = (rank.unsqueeze(1) == number.unsqueeze(1)) & keep.unsqueeze(1)
    dropped = ((~keep).cumsum(1) - 1).clamp(min=0).unsqueeze(1).expand(itself.shape)
    merged = ~keep if among is None else ~keep & among
    weights = torch.where(merged.unsqueeze(1), plan.gather(2, dropped), itself.to(torch.float32))
    return weights / weights.sum(2, keepdim=True)


transport_weights = _library.define(
    "transport_weights(Tensor plan, Tensor keep, Tensor? among, str normalise) -> Tensor", reference
)
