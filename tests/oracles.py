"""Naive oracles of the ops: Python loops and float64, one row at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ranked(scores: list[float], classes: list[int]) -> list[int]:
    """Token indices, best first: class, then score (class 0 ignores it), then lowest index. NaN is below -inf."""

    def order(i: int) -> tuple:
        value = scores[i] if classes[i] > 0 else 0.0
        return (-classes[i], math.isnan(value), 0.0 if math.isnan(value) else -value, i)

    return sorted(range(len(scores)), key=order)


def fill(first: list[Tensor], scores: Tensor, among: Tensor | None, k: int) -> Tensor:
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for b, row in enumerate(scores.float().tolist()):
        classes = [1 if among is None or bool(among[b, i]) else 0 for i in range(len(row))]
        for rank, group in reversed(list(enumerate(first))):
            classes = [len(first) - rank + 1 if bool(group[b, i]) else c for i, c in enumerate(classes)]
        keep[b, ranked(row, classes)[:k]] = True
    return keep


def dilated(
    mask: Tensor, offsets: list[tuple[int, int]], height: int, width: int, edges: str, tokens: int | None = None
) -> Tensor:
    """A grid may end within its last row, after a number of tokens."""
    out = torch.zeros_like(mask)
    tokens = height * width if tokens is None else tokens
    for b, i in mask.nonzero().tolist():
        for dy, dx in offsets:
            y, x = i // width + dy, i % width + dx
            if edges == "clamp_flat":
                out[b, min(max(i + dy * width + dx, 0), tokens - 1)] = True
            elif 0 <= y < height and 0 <= x < width and y * width + x < tokens:
                out[b, y * width + x] = True
    return out


def masked_logits(
    query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool, softcap: float
) -> Tensor:
    """Scaled, capped and masked products float64 [B, H, Tq, Tk]."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.transpose(2, 3) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.double()
    if is_causal:
        logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    return logits


def probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax probabilities float64 [B, H, Tq, Tk]; fully masked rows are 0."""
    logits = masked_logits(query, key, mask, scale, is_causal, softcap)
    if sinks is None:
        return logits.softmax(-1).nan_to_num(0.0)
    column = sinks.double().expand(logits.shape[:2])[..., None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def over_heads(x: Tensor, heads: str) -> Tensor:
    return {"mean": x.mean(1), "max": x.amax(1), "sum": x.sum(1)}[heads]


def received(p: Tensor, rows: Tensor | None, heads: str, reduce: str) -> Tensor:
    """Column sums or means of probabilities [B, H, Tq, Tk] over the counted rows, then over heads."""
    counted = torch.ones(p.shape[0], p.shape[2]) if rows is None else rows.double()
    columns = (p * counted[:, None, :, None]).sum(2)
    if reduce == "mean":
        columns = columns / counted.sum(1).clamp(min=1)[:, None, None]
    return over_heads(columns, heads)
