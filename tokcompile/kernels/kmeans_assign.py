"""tokred::kmeans_assign: clusters of tokens by direction."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _hash, _library, _vectors


def reference(x: Tensor, k: int, iterations: int, seed: int) -> Tensor:
    """Label tokens by k-means on the unit sphere, with a fixed number of steps.

    Tokens are scaled to length one. The first centroids are tokens, drawn as k-means++ draws them (Arthur and
    Vassilvitskii, 2007): the first one uniformly, the others with odds of 1e-6 plus the squared Euclidean distance to
    the nearest centroid drawn before, no token twice. Draws are a hash of the seed, the same in each row.
    Each step gives a token the centroid c of least 1 - cos(z, c), and makes each centroid the plain mean of its
    tokens; one without tokens stays as it is. Sums are float64, so that equal tokens are ties in every step.
    Memory and time of a step: T * k and T * k * C.

    Args:
        x: float [B, T, C], computed in float32 whatever the dtype. A zero token stays zero and gets label 0.
        k: clusters, 1 <= k <= T.
        iterations: steps, >= 1; the labels of the last one are returned, its means are not needed.
        seed: any int64.

    Returns:
        int64 [B, T] in [0, k), numbered in the order of the draws; the lowest number wins a tie.

    Raises:
        ValueError: x is not [B, T, C], or k or iterations are out of range.
    """
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, C], not {list(x.shape)}")
    if k < 1 or iterations < 1:
        raise ValueError(f"k and iterations must be at least 1, not {k} and {iterations}")
    torch._check_value(x.shape[1] >= k, lambda: f"cannot make {k} clusters of {x.shape[1]} tokens")
    unit = _vectors.unit(x.to(torch.float32))
    centroids = _drawn(unit, k, seed)
    labels = _nearest(unit, centroids)
    for _ in range(iterations - 1):
        centroids = _means(unit, labels, centroids)
        labels = _nearest(unit, centroids)
    return labels


def _drawn(unit: Tensor, k: int, seed: int) -> Tensor:
    """k tokens of unit [B, T, C] as first centroids [B, k, C]."""
    batch, tokens, _ = unit.shape
    index = torch.arange(tokens, device=unit.device)
    odds = torch.ones_like(unit[:, :, 0])
    free = torch.ones_like(odds, dtype=torch.bool)
    distance, drawn = torch.full_like(odds, torch.inf), []
    for number in range(k):
        # A token's share of the unit interval ends where the running sum of odds does.
        ends = torch.where(free, odds, 0.0).cumsum(1)
        share = (_hash.hashed(number, seed) >> 9) * 2.0**-23
        chosen = (free & (ends > ends[:, -1:] * share)).to(torch.int32).argmax(1, keepdim=True)
        drawn.append(unit.gather(1, chosen.unsqueeze(2).expand(batch, 1, unit.shape[2])))
        free = free & (index != chosen)
        distance = torch.minimum(distance, (unit - drawn[-1]).square().sum(2))
        odds = distance + 1e-6
    return torch.cat(drawn, 1)


def _nearest(unit: Tensor, centroids: Tensor) -> Tensor:
    return (1 - _vectors.likeness(unit, _vectors.unit(centroids))).argmin(2)


def _means(unit: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Means of the tokens of each label; a label that no token has keeps its centroid."""
    of_label = labels.unsqueeze(1) == torch.arange(centroids.shape[1], device=unit.device)[:, None]
    count = of_label.sum(2, keepdim=True)
    total = torch.matmul(of_label.to(torch.float64), unit.to(torch.float64))
    return torch.where(count > 0, (total / count.clamp(min=1)).to(torch.float32), centroids)


kmeans_assign = _library.define("kmeans_assign(Tensor x, int k, int iterations, int seed) -> Tensor", reference)
