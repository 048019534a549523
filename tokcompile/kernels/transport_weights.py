"""tokred::transport_weights: a plan of transport as the weights of a merge."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library

NORMALISE = ("plan", "row")


def reference(
    plan: Tensor, nearest: Tensor | None, keep: Tensor, among: Tensor | None, hard: float, normalise: str
) -> Tensor:
    """What each kept token is made of: itself and its shares, divided by one and their sum.

    AOT (TyroneLi/AOT at 88455ee, `llava_arch.py`): a' = (a + P^T x) / (1 + the sum of a's shares), blended with
    a'' = (a + all x that are most alike a) / (1 + their number) as (1 - hard) a' + hard a'', with hard = 0.1.

    Args:
        plan: float [B, n, M], the share of each dropped token in each kept one.
        nearest: int64 [B, M], the kept token that each dropped one goes to whole; may be None when hard is 0.
        keep: bool [B, T], T = n + M, with n True in each row; kept and dropped tokens are numbered in its order.
        among: bool [B, T]: the dropped tokens that are merged, all others vanish; None for all.
        hard: share of the hard assignment, in [0, 1].
        normalise: `plan`: shares as they are, each kept token's sum to 1 / n and move it little. `row`: shares of each
            dropped token are scaled to sum to 1, so that all of it arrives; AOT's transport between frames.

    Returns:
        float32 [B, n, T]; the weights of each new token sum to 1. A kept token gives to itself alone.

    Raises:
        ValueError: another rank or dtype, unknown `normalise`, or hard without nearest.
    """
    if normalise not in NORMALISE:
        raise ValueError(f"normalise must be one of {', '.join(NORMALISE)}, not {normalise!r}")
    if plan.dim() != 3 or keep.dim() != 2 or keep.dtype != torch.bool:
        raise ValueError(
            f"plan must be [B, n, M] and keep bool [B, T], not {list(plan.shape)} and {keep.dtype} {list(keep.shape)}"
        )
    if not 0 <= hard <= 1 or (hard and nearest is None):
        raise ValueError(f"hard {hard} must be in [0, 1], and needs `nearest` unless it is 0")
    plan = plan.to(torch.float32)
    if normalise == "row":
        total = plan.sum(1, keepdim=True)
        plan = plan / torch.where(total == 0, 1.0, total)
    weights = _placed(plan, keep, among)
    if not hard or nearest is None:
        return weights
    number = torch.arange(plan.shape[1], device=plan.device)
    whole = (nearest.unsqueeze(1) == number.unsqueeze(1)).to(torch.float32)
    return (1 - hard) * weights + hard * _placed(whole, keep, among)


def _placed(shares: Tensor, keep: Tensor, among: Tensor | None) -> Tensor:
    """Shares [B, n, M] and the kept tokens themselves as weights [B, n, T] that sum to 1."""
    rank = keep.cumsum(1) - 1
    number = torch.arange(shares.shape[1], device=shares.device)
    itself = (rank.unsqueeze(1) == number.unsqueeze(1)) & keep.unsqueeze(1)
    dropped = ((~keep).cumsum(1) - 1).clamp(min=0).unsqueeze(1).expand(itself.shape)
    given = shares.gather(2, dropped)
    merged = ~keep if among is None else ~keep & among
    weights = torch.where(merged.unsqueeze(1), given, itself.to(torch.float32))
    return weights / weights.sum(2, keepdim=True)


transport_weights = _library.define(
    "transport_weights(Tensor plan, Tensor? nearest, Tensor keep, Tensor? among, float hard, str normalise) -> Tensor",
    reference,
)
