"""What learned tokens start from: directions of a model's own features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 0.01
"""The weight that soft assignment leaves to the second centroid of an average descriptor."""


def scaled_centroids(descriptors: Tensor, count: int, *, iterations: int = 100, seed: int = 0) -> Tensor:
    """Cluster unit descriptors, and scale the centroids so that assignment by their products is sharp.

    Centroids of k-means are made unit vectors c_k; with s1 and s2 the two largest products of a descriptor with them,
    alpha = -ln(0.01) / mean(s1 - s2), of one centroid -ln(0.01) / mean(s1). The result is alpha * c_k: a start for
    aggregation tokens ("Towards Implicit Aggregation", section 3; the initialisation of NetVLAD).

    Args:
        descriptors: floating point [N, C], features of the model to be fine-tuned; made unit vectors here.
        count: clusters M, at most N.
        iterations: of Lloyd's algorithm.
        seed: which descriptors the centroids start from.

    Returns:
        float32 [M, C], for `weights.load_state_dict({"RULE.NAME": ...})`.

    Raises:
        ValueError: there are fewer descriptors than clusters, or they lie in one point.
    """
    if descriptors.ndim != 2 or not 0 < count <= len(descriptors):
        raise ValueError(f"{count} clusters of {list(descriptors.shape)} descriptors")
    unit = torch.nn.functional.normalize(descriptors.float(), dim=-1)
    chosen = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:count]
    centroids = unit[chosen.to(unit.device)]
    for _ in range(iterations):
        centroids = _means(unit, centroids)
    centroids = torch.nn.functional.normalize(centroids, dim=-1)
    alike = (unit @ centroids.T).sort(-1, descending=True).values
    margin = (alike[:, 0] - alike[:, 1] if count > 1 else alike[:, 0]).mean().item()
    if margin <= 0:
        raise ValueError("the descriptors do not tell clusters apart")
    return centroids * (-math.log(LEAST) / margin)


def _means(unit: Tensor, centroids: Tensor) -> Tensor:
    """The mean of the descriptors nearest to each centroid; one without any stays."""
    nearest = torch.cdist(unit, centroids).argmin(1)
    sums = torch.zeros_like(centroids).index_add(0, nearest, unit)
    held = torch.bincount(nearest, minlength=len(centroids))[:, None]
    return torch.where(held > 0, sums / held.clamp(min=1), centroids)
