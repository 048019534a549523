"""tokred::density_peaks: the tokens that clusters form around."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _distance, _library


def reference(x: Tensor, clusters: int, neighbours: int) -> Tensor:
    """Choose tokens that are dense and far from any denser one: DPC-KNN.

    Du, Ding and Jia, "Study on density peaks clustering based on k-nearest neighbors and principal component
    analysis", 2016, as PPE uses it (MouxiaoHuang/PPE at 7b6aa7d). Distances D are ||x_i - x_j|| / sqrt(C).
    A token's density is exp(-mean of its `neighbours` smallest D^2), itself included; its distance is the least D to a
    denser token, for the densest the largest D of its row; its score is the product. A lower index breaks ties of
    density and of score, in place of the random noise that the released code adds.

    Args:
        x: real [B, T, C], compared as float32.
        clusters: M, static or symbolic, 1 <= M <= T.
        neighbours: at least 1; min(3, max(M // 2, 1)) is used where it is more than M.

    Returns:
        int64 [B, M]: token indices, the best score first.

    Raises:
        ValueError: another rank, or no neighbour. RuntimeError: clusters out of range.
    """
    if x.dim() != 3 or neighbours < 1:
        raise ValueError(f"x must be [B, T, C] and neighbours at least 1, not {list(x.shape)} and {neighbours}")
    tokens = x.shape[1]
    torch._check(clusters >= 1, lambda: f"cannot make {clusters} clusters: at least 1")
    torch._check(clusters <= tokens, lambda: f"cannot make {clusters} clusters of {tokens} tokens")
    near = neighbours if neighbours <= clusters else min(3, max(clusters // 2, 1))
    apart = _distance.distances(x, x)
    density = (-apart.topk(near, dim=2, largest=False).values.square().mean(2)).exp()
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril(-1)
    mine, other = density.unsqueeze(2), density.unsqueeze(1)
    denser = (other > mine) | ((other == mine) & lower)
    away = torch.where(denser, apart, torch.inf).amin(2)
    furthest = apart.amax((1, 2)).unsqueeze(1)
    scores = torch.where(away == torch.inf, furthest, away) * density
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :clusters].contiguous()


density_peaks = _library.define("density_peaks(Tensor x, SymInt clusters, int neighbours) -> Tensor", reference)
