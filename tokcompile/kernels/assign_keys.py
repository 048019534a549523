"""tokred::assign_keys: into which key that stays each other key of a cache is merged, or that it is thrown away."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _candidates, _library
from ._vectors import cosines


def reference(
    keys: Tensor,
    values: Tensor,
    scores: Tensor,
    index: Tensor,
    valid: Tensor | None,
    among: Tensor | None,
    first: int,
    last: int,
    alike: float,
    spare: float,
) -> Tensor:
    """Put the keys that were up for choice and not chosen into classes around those that were chosen.

    The likeness of two tokens is the cosine of their keys times that of their values, each at least 0: two negative
    cosines are no likeness.

    Args:
        keys, values: float [B, H, T, D] and [B, H, T, Dv].
        scores: real [B, H, T], counted as float32, and as 0 where negative.
        index: int64 [B, H, k], the keys that stay.
        valid: bool [B, T], real tokens; None: all are.
        among: bool [B, T], the tokens that were up for choice; None: all.
        first, last: how many real tokens at either end of a row stay in any case. Nothing is merged into these, nor
            into tokens outside `among`.
        alike: a token less alike than this to each of those that stay is in class 0.
        spare: tokens of the smallest scores are in class 0, as many as have together at most this share of the sum of
            the scores of all that were up for choice; of equal ones the last first.

    Returns:
        int64 [B, H, T]: 1 + the place in `index` of the token that each goes into, itself for one that stays; 0 where
        it goes into none. Padding goes into none. Ties go to the lowest place.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, heads, tokens = scores.shape
    whole = (batch, heads, tokens)
    if keys.shape[:3] != whole or values.shape[:3] != whole or index.dim() != 3 or index.shape[:2] != whole[:2]:
        raise ValueError(
            f"keys, values, scores and index must be [B, H, T, D], [B, H, T, D], [B, H, T] and [B, H, k], not "
            f"{list(keys.shape)}, {list(values.shape)}, {list(scores.shape)} and {list(index.shape)}"
        )
    count = index.shape[2]
    own = torch.zeros(whole, dtype=torch.int64, device=scores.device)
    if count == 0:
        return own
    place = torch.arange(1, count + 1, device=scores.device)
    own = own.scatter(2, index, place.expand(batch, heads, count))
    up = _candidates.between_ends(valid, among, batch, tokens, first, last, scores.device)
    goes = up[:, None] & (own == 0) & ~_spared(scores, up[:, None], spare)
    classes = []
    for head in range(heads):
        best, nearest = _nearest(keys[:, head], values[:, head], index[:, head], up)
        joins = goes[:, head] & (best >= 0) & (best >= alike)
        classes.append(torch.where(joins, nearest + 1, own[:, head]))
    return torch.stack(classes, 1)


def _spared(scores: Tensor, up: Tensor, spare: float) -> Tensor:
    """bool [B, H, T]: the tokens of the smallest scores, up to a share of the sum."""
    if spare <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    mass = torch.where(up, scores.to(torch.float32).clamp(min=0), 0.0)
    # Descending, stable and then turned round: of equal scores the last token goes first, as in a choice of the best.
    order = torch.where(up, mass, -torch.inf).sort(dim=2, descending=True, stable=True).indices.flip(2)
    so_far = mass.gather(2, order).cumsum(2)
    low = so_far <= spare * so_far[..., -1:]
    return torch.zeros_like(low).scatter(2, order, low)


def _nearest(keys: Tensor, values: Tensor, index: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """How alike each token [B, T] is to the most alike of one head's tokens that stay, and the place of that one.

    One head at a time: [B, T, k] numbers are all that ever exist. Where a row has none to go into it is -1.
    """
    both = [cosines(x, x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))).clamp(min=0) for x in (keys, values)]
    likeness = torch.where(up.gather(1, index)[:, None], both[0] * both[1], -1.0)
    best = likeness.amax(2, keepdim=True)
    place = torch.arange(index.shape[1], device=index.device)
    return best[..., 0], torch.where(likeness == best, place, index.shape[1]).amin(2)


assign_keys = _library.define(
    "assign_keys(Tensor keys, Tensor values, Tensor scores, Tensor index, Tensor? valid, Tensor? among, int first, "
    "int last, float alike, float spare) -> Tensor",
    reference,
)
