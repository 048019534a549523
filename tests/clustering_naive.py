"""Clusters around density peaks by loops over tokens, and a decoder run on tokens whose positions are given."""

from __future__ import annotations

import math

import naive
import torch
from torch import Tensor, nn


def distance(one: Tensor, other: Tensor) -> Tensor:
    """A float32 scalar, of float32 tokens."""
    return (one - other).square().sum().sqrt() / math.sqrt(len(one))


def peaks_by_loops(x: Tensor, clusters: int, neighbours: int) -> tuple[list[int], float]:
    """Centres of one row [T, C], best first, and the least gap between scores that decide."""
    tokens = range(len(x))
    near = neighbours if neighbours <= clusters else min(3, max(clusters // 2, 1))
    apart = [[distance(x[i], x[j]) for j in tokens] for i in tokens]
    density = [(-torch.stack(sorted(row)[:near]).square().mean()).exp() for row in apart]
    scores = []
    for i in tokens:
        denser = [j for j in tokens if density[j] > density[i] or (density[j] == density[i] and j < i)]
        least = min(apart[i][j] for j in denser) if denser else max(max(row) for row in apart)
        scores.append(float(least * density[i]))
    order = sorted(tokens, key=lambda i: (-scores[i], i))
    gaps = [scores[a] - scores[b] for a, b in zip(order[:clusters], order[1:], strict=False)]
    ranked = sorted(float(d) for d in density)
    gaps += [b - a for a, b in zip(ranked, ranked[1:], strict=False)]
    return order[:clusters], min(gaps, default=1.0)


def labels_by_loops(x: Tensor, centres: list[int]) -> list[int]:
    out = []
    for i in range(len(x)):
        far = [float(distance(x[i], x[c])) for c in centres]
        out.append(centres.index(i) if i in centres else far.index(min(far)))
    return out


def slots_by_loops(x: Tensor, centres: list[int], labels: list[int], slots: int) -> list[list[int]]:
    table = []
    for number, centre in enumerate(centres):
        members = [i for i, label in enumerate(labels) if label == number]
        members.sort(key=lambda i: (float(distance(x[i], x[centre])), i))
        table.append([members[k % len(members)] for k in range(slots)])
    return table


def means(x: Tensor, labels: list[int], clusters: int) -> Tensor:
    """The mean of the tokens [T, C] of each cluster, in float32 and then in the dtype of the tokens."""
    groups = [[i for i, label in enumerate(labels) if label == number] for number in range(clusters)]
    return torch.stack([x[group].float().mean(0) for group in groups]).to(x.dtype)


@torch.no_grad()
def decode(model: nn.Module, hidden: Tensor, valid: Tensor, positions: Tensor) -> Tensor:
    """Logits of a language model on embeddings [B, T, C] in their order; `valid` and `positions` are [B, T]."""
    text = getattr(model.model, "language_model", model.model)
    tokens = hidden.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() & valid[:, None, None, :]
    tables = text.rotary_emb(hidden, positions)
    for layer in text.layers:
        out = layer(
            hidden,
            attention_mask=naive._for(model, mask, hidden.dtype),
            position_ids=positions,
            position_embeddings=tables,
        )
        hidden = out[0] if isinstance(out, tuple) else out
    return model.lm_head(text.norm(hidden))
