"""What the ops share that merge the frames of a clip: how frames are cut into clips, and the steps through one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .transport_cost_over_time import reference as cost_over_time
from .transport_plan import reference as share_out

Stays = Callable[[Tensor, int], Tensor]
"""Which tokens of a frame stay, bool [N, m], given how well each fits, float32 [N, m], and the number of the frame."""


def cut(frames: int, clip: int) -> list[tuple[int, int, int]]:
    """Clips of one length each: the first frame, how many clips, and their frames. What is left over is a clip."""
    if clip < 1 or frames < 1:
        raise ValueError(f"{frames} frames cannot be cut into clips of {clip}")
    whole, rest = frames // clip, frames % clip
    parts = [(0, whole, clip), (whole * clip, 1, rest)]
    return [part for part in parts if part[1] and part[2]]


def emitted(count: int, length: int, chosen: int) -> int:
    """How many tokens one clip becomes: the first frame's, those that stay of each later one, and the merged first."""
    return chosen if length == 1 else 2 * chosen + (length - 1) * count


def apart(x: Tensor, start: int, number: int, length: int) -> Tensor:
    """The frames of some clips of one length, [N, F, ...] to [N * clips, length, ...]."""
    part = x[:, start : start + number * length]
    return part.reshape(-1, length, *x.shape[2:])


def shares(keyframe: Tensor, frame: Tensor, later: int, spread: float, temperature: float, iterations: int) -> Tensor:
    """How each token of a frame [N, m, C] is poured into those of the keyframe, float32 [N, n, m]; columns sum to 1."""
    cost = cost_over_time(keyframe, frame, float(later), spread)
    plan = share_out(cost, temperature, iterations)
    total = plan.sum(1, keepdim=True)
    return plan / torch.where(total == 0, 1.0, total)


def scan(x: Tensor, stays: Stays, spread: float, temperature: float, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """Go through the frames of clips, and merge those tokens of each into the first frame that do not stay.

    AOT (TyroneLi/AOT at 88455ee, `llava_arch.py`), the transport between frames: Y <- (Y + P^T S) / (1 + colsum(P)), S
    the tokens that do not stay, P their shares in Y. A token of Y weighs 1 at every step.

    Args:
        x: float [N, L, m, C].

    Returns:
        float [N, m, C], what the first frame has become, in float32 or wider; and bool [N, m] for each later frame.
    """
    merged = x[:, 0].to(torch.promote_types(x.dtype, torch.float32))
    kept = []
    for later in range(1, x.shape[1]):
        frame = x[:, later].to(merged.dtype)
        poured = shares(merged, frame, later, spread, temperature, iterations)
        kept.append(stays(poured.amax(1), later))
        poured = poured.masked_fill(kept[-1].unsqueeze(1), 0.0).to(merged.dtype)
        merged = (merged + torch.matmul(poured, frame)) / (1 + poured.sum(2, keepdim=True))
    return merged, kept


def check(x: Tensor, stays: Tensor | None = None) -> None:
    """Refuse tokens that are not [N, F, m, C], and a mask of others. Raises ValueError."""
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be float [N, F, m, C], not {x.dtype} {list(x.shape)}")
    if stays is not None and (stays.dtype != torch.bool or stays.shape != x.shape[:3]):
        raise ValueError(f"stays must be bool {list(x.shape[:3])}, not {stays.dtype} {list(stays.shape)}")
