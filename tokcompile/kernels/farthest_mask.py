"""tokred::farthest_mask: tokens that are far from each other, by a walk from the one to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _library, _order
from .nearest_distance import check


def reference(distances: Tensor, start: Tensor, among: Tensor | None, k: int) -> Tensor:
    """Mark k tokens of each row: one to begin with, then k - 1 times the one farthest from all that are marked.

    The greedy solution of max-min diversity: DivPrune (Alvar et al. 2025), algorithm 1, begins with the token that is
    farthest from its nearest. How far a token is from those that are marked is the least of its distances to them. No
    token is marked twice.

    Args:
        distances: float [B, T, T], compared as float32; row i holds the distances from token i. NaN is below all.
        start: real [B, T], compared as float32; the walk begins where it is largest.
        among: bool [B, T] or None; tokens outside it are marked only when fewer than k are inside, lowest index first.
        k: static or symbolic, 0 <= k <= T.

    Returns:
        bool [B, T] with exactly k True in each row. Ties go to the lowest index.

    Raises:
        ValueError: shapes that do not fit. RuntimeError: k out of range.
    """
    _check(distances, start, among)
    tokens = start.shape[1]
    torch._check(k >= 0, lambda: f"cannot select k={k} tokens: k must not be negative")
    torch._check(k <= tokens, lambda: f"cannot select k={k} of {tokens} tokens")
    inside = torch.ones_like(start, dtype=torch.bool) if among is None else among
    free, far = torch.ones_like(inside), start.to(torch.float32)
    index = torch.arange(tokens, device=start.device)
    for step in range(k):
        key = _order.pack(torch.where(free, 1 + inside.to(torch.int64), 0), far, inside & free)
        at = key.argmax(1, keepdim=True)
        free = free & (index != at)
        row = distances.gather(1, at[:, :, None].expand(-1, 1, tokens)).squeeze(1).to(torch.float32)
        far = row if step == 0 else torch.minimum(far, row)
    return ~free


def fake(distances: Tensor, start: Tensor, among: Tensor | None, k: Any) -> Tensor:
    """Its shape, without a walk."""
    del k
    _check(distances, start, among)
    return torch.empty_like(start, dtype=torch.bool, memory_format=torch.contiguous_format)


def _check(distances: Tensor, start: Tensor, among: Tensor | None) -> None:
    check(distances, among)
    _order.check_rows(start, [])
    torch._check_value(
        start.shape == distances.shape[:2],
        lambda: f"start must be {list(distances.shape[:2])}, not {list(start.shape)}",
    )


farthest_mask = _library.define(
    "farthest_mask(Tensor distances, Tensor start, Tensor? among, SymInt k) -> Tensor",
    reference,
    triton="triton_farthest_mask",
    fake=fake,
)
