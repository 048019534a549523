"""tokred::pairwise_keys: keys of each head that win against their neighbours, two by two along the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .keep_keys import reference as keep_keys


def reference(scores: Tensor, valid: Tensor | None, turn: Tensor, first: int, last: int, k: int, most: int) -> Tensor:
    """Remove one of two neighbours at a time, and go on to the next two, until k keys are left.

    TreeKV (He et al. 2025), Algorithm 1, with fixed scores. Of c keys that compete, removal number t compares those at
    places i = t mod c and i + 1 of what is left at that time: the left one stays where its score is larger, the right
    one where not. So old parts of a sequence get sparse and recent ones stay dense. Within a round of c removals the
    pairs have no key in common: a round is one step here.

    Args:
        scores: real [B, H, T], compared as float32.
        valid: bool [B, T], real tokens; None: all are. Padding does not compete; it is kept only where a row has fewer
            than k real tokens.
        turn: int64 [B], how many removals each row has seen before.
        first, last: how many real tokens at either end of a row do not compete and stay; c = k - first - last, at
            least 1.
        k: how many stay, 0 < k <= T.
        most: no row has more than k + most real tokens.

    Returns:
        int64 [B, H, k], ascending.

    Raises:
        ValueError: shapes that do not fit, or a negative count.
    """
    if scores.dim() != 3 or turn.shape != scores.shape[:1]:
        raise ValueError(f"scores and turn must be [B, H, T] and [B], not {list(scores.shape)} and {list(turn.shape)}")
    if min(first, last, most) < 0:
        raise ValueError(f"first, last and most must not be negative, not {first}, {last} and {most}")
    batch, heads, tokens = scores.shape
    device = scores.device
    places, real = _real_first(valid, batch, tokens, device)
    few = keep_keys(scores, valid, None, 0, 0, k)
    if most == 0:
        return few
    ranked = scores.to(torch.float32).gather(2, places[:, None].expand(batch, heads, tokens))
    slot = torch.arange(tokens, device=device)
    left = slot.expand(batch, heads, tokens)
    size = max(k - first - last, 1) if isinstance(k, int) else torch.sym_max(k - first - last, 1)
    over, at = (real - k).clamp(min=0), turn % size
    for _ in range(_rounds(most, size)):
        count = torch.minimum(over, size - at)
        left = _round(left, ranked, slot, first + at, count)
        over, at = over - count, torch.zeros_like(at)
    chosen = places[:, None].expand(batch, heads, tokens).gather(2, left[..., :k])
    return torch.where((real > k)[:, None, None], chosen, few)


def _rounds(most: int, size: int) -> int:
    """Rounds until `most` are removed: the first one may begin at its last pair."""
    return 1 + -(-(most - 1) // size) if isinstance(size, int) else most


def _real_first(valid: Tensor | None, batch: int, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [B, T]: where the real tokens of each row stand, then the padding; and int64 [B], how many are real."""
    index = torch.arange(tokens, device=device).expand(batch, tokens)
    if valid is None:
        return index, torch.full((batch,), tokens, device=device)
    return torch.argsort(torch.where(valid, index, index + tokens), 1), valid.sum(1)


def _round(left: Tensor, ranked: Tensor, slot: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """Remove one of each of `count` pairs, which begin at place `start`; later keys move up."""
    start, count, top = start[:, None, None], count[:, None, None], slot.shape[0] - 1
    pair = (start + 2 * (slot - start)).clamp(0, top).expand_as(left)
    one, other = left.gather(2, pair), left.gather(2, (pair + 1).clamp(max=top))
    winner = torch.where(ranked.gather(2, one) > ranked.gather(2, other), one, other)
    moved = left.gather(2, (slot + count).clamp(max=top).expand_as(left))
    return torch.where(slot < start, left, torch.where(slot < start + count, winner, moved))


pairwise_keys = _library.define(
    "pairwise_keys(Tensor scores, Tensor? valid, Tensor turn, int first, int last, SymInt k, int most) -> Tensor",
    reference,
)
