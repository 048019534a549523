"""tokred::keep_pairs: which keys of a layer stay, chosen over all of its heads together."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _order
from .keep_keys import PADDING, STAYS, classes_of
from .kept_indices import reference as indices_of

FLOORS = ("blend", "reserve")


def reference(
    scores: Tensor,
    valid: Tensor | None,
    among: Tensor | None,
    first: int,
    last: int,
    k: int,
    part: int,
    whole: int,
    floor_by: str,
) -> Tensor:
    """Choose H * k pairs of a head and a token; heads with more of the largest scores keep more.

    Ada-KV (Feng et al. 2024), section 4: the budgets of heads are how many of the H * k largest scores of all heads are
    each one's, with a floor.

    Args:
        scores: real [B, H, T], compared as float32 over all heads; H * T is at most 2^24.
        valid: bool [B, T], real tokens; None: all are. Padding is kept only where a row has fewer than k real tokens.
        among: bool [B, T], the tokens that are up for choice; all others stay. None: all are up for choice.
        first, last: how many real tokens at either end of a row stay in every head, and count in its budget.
        k: how many stay of each head on average, 0 <= k <= T, with room for the tokens that stay in any case.
        part, whole: the floor as a fraction, 0 <= part <= whole.
        floor_by: "blend": a head that won c of the largest keeps its best c * (1 - floor) + k * floor, rounded by
            largest remainder, ties to the lower head. "reserve": the best k * part // whole of each head, at least one,
            stay, and the largest of all others fill up.

    Returns:
        int64 [B, H, k]: head * T + token, ascending when read row by row. Every head keeps the real tokens that come
        first in its own order. Equal scores: the lower token, then the lower head, so that equal heads keep equally
        many; NaN ranks below -inf.

    Raises:
        ValueError: shapes that do not fit, a mask that is not bool, no fraction, or an unknown `floor_by`.
        RuntimeError: k out of range, or too many scores.
    """
    if floor_by not in FLOORS or not 0 <= part <= whole or whole < 1:
        raise ValueError(
            f"floor_by must be one of {', '.join(FLOORS)}, and the floor from 0 to 1, not {floor_by!r}, {part}/{whole}"
        )
    classes = classes_of(scores, valid, among, first, last)
    batch, heads, tokens = scores.shape
    torch._check(heads * tokens <= _order.MAX_TOKENS, lambda: f"cannot compare {heads} heads of {tokens} tokens")
    if k == 0:
        return torch.zeros(batch, heads, 0, dtype=torch.int64, device=scores.device)
    wide = classes[:, None].expand(batch, heads, tokens)
    own = _order.pack(*(x.reshape(batch * heads, tokens) for x in (wide, scores, wide > PADDING)))
    own = own.reshape(batch, heads, tokens)
    best = own.sort(-1, descending=True).values
    if floor_by == "reserve":
        least = torch.sym_max(k * part // whole, 1)
        reserved = (own >= best[:, :, least - 1 : least]) & (wide > PADDING)
        keep = _largest(torch.where(reserved, STAYS, wide), scores, heads * k)
    else:
        won = _largest(wide, scores, heads * k).sum(-1)
        budgets = _shared_out(won * (whole - part) + k * part, whole, heads * k)
        last_kept = best.gather(-1, (budgets - 1).clamp(min=0)[..., None])
        keep = (own >= last_kept) & (budgets > 0)[..., None]
    return indices_of(keep.reshape(batch, heads * tokens), heads * k).reshape(batch, heads, k)


def _largest(classes: Tensor, scores: Tensor, count: int) -> Tensor:
    """bool [B, H, T]: so many of all heads' keys, by class, score, lowest token and lowest head."""
    batch, heads, tokens = scores.shape
    flat = [x.transpose(1, 2).reshape(batch, tokens * heads) for x in (classes, scores)]
    keep = _order.largest(_order.pack(*flat, flat[0] > PADDING), count)
    return keep.reshape(batch, tokens, heads).transpose(1, 2)


def _shared_out(shares: Tensor, whole: int, total: int) -> Tensor:
    """int64 [B, H]: shares / whole as whole numbers that sum to the total; the largest remainders are rounded up."""
    heads = shares.shape[1]
    counts = shares // whole
    order = shares % whole * heads + torch.arange(heads - 1, -1, -1, device=shares.device)
    rank = (order[:, :, None] < order[:, None, :]).sum(-1)
    return counts + (rank < total - counts.sum(1, keepdim=True))


keep_pairs = _library.define(
    "keep_pairs(Tensor scores, Tensor? valid, Tensor? among, int first, int last, SymInt k, int part, int whole, "
    "str floor_by) -> Tensor",
    reference,
)
