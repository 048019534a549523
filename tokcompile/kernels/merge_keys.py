"""tokred::merge_keys: the tokens of a cache that stay, each the mean of those that were merged into it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _turning
from .gather_keys import reference as gather_keys


def reference(
    cache: Tensor,
    index: Tensor,
    classes: Tensor,
    weights: Tensor,
    plain: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    neighbours: bool,
) -> Tensor:
    """Gather tokens of a cache head by head, each replaced by the weighted mean of its class.

    Args:
        cache: float [B, H, T, D].
        index: int64 [B, H, k], the tokens that stay.
        classes: int64 [B, H, T], as `assign_keys` gives them: 1 + the place in `index` that each token goes into, or 0.
        weights: real [B, H, T], counted as float32, and as 0 where negative.
        plain: float [B, H, T, D], what is averaged in place of `cache`: keys that are not turned. The means are then
            turned at the places of the tokens that stay.
        cos, sin: float [B or 1, H or 1, T, W], tables of that rotation; with `plain` alone.
        neighbours: as for `unturn_keys`.

    Returns:
        [B, H, k, D], dtype of `cache`, means added up in float32. A token that is alone in its class, or in one whose
        weights are all 0, is bit for bit the one in the cache.

    Raises:
        ValueError: shapes that do not fit, or `plain` without tables.
    """
    if cache.dim() != 4 or classes.shape != cache.shape[:3] or weights.shape != classes.shape:
        raise ValueError(
            f"cache, classes and weights must be [B, H, T, D], [B, H, T] and [B, H, T], not {list(cache.shape)}, "
            f"{list(classes.shape)} and {list(weights.shape)}"
        )
    if plain is not None and (cos is None or sin is None or plain.shape != cache.shape):
        raise ValueError("plain keys must be of the shape of the cache, and come with the tables that turn them")
    whole = (cache if plain is None else plain).to(torch.float32)
    weights = weights.to(torch.float32).clamp(min=0)
    parts = [_means(whole[:, h], classes[:, h], weights[:, h], index.shape[2]) for h in range(cache.shape[1])]
    means, several = (torch.stack(each, 1) for each in zip(*parts, strict=True))
    if plain is not None:
        _turning.check(cache, cos, sin)
        shape = (cache.shape[0], cache.shape[1], *cos.shape[2:])
        tables = [gather_keys(table.to(torch.float32).expand(shape), index) for table in (cos, sin)]
        means = _turning.turn(means, *tables, neighbours)
    return torch.where(several[..., None], means.to(cache.dtype), gather_keys(cache, index))


def _means(x: Tensor, classes: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Weighted means [B, k, D] of one head's classes, and bool [B, k]: which are of several tokens and of any weight.

    A product with [B, k, T] weights adds up in the same order in every run, which a scatter on a GPU does not.
    """
    member = classes[:, None] == torch.arange(1, count + 1, device=x.device)[:, None]
    share = torch.where(member, weights[:, None], 0.0)
    total = share.sum(2, keepdim=True)
    # What goes nowhere may hold anything, NaN too.
    sums = torch.bmm(share, torch.where(classes[..., None] > 0, x, 0.0))
    several = (member.sum(2) > 1) & (total[..., 0] > 0)
    return sums / torch.where(total > 0, total, 1.0), several


merge_keys = _library.define(
    "merge_keys(Tensor cache, Tensor index, Tensor classes, Tensor weights, Tensor? plain, Tensor? cos, Tensor? sin, "
    "bool neighbours) -> Tensor",
    reference,
    triton="triton_merge_keys",
)
