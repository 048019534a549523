"""A total order of tokens packed into one integer, for the ops that select by score."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

INDEX_BITS = 24
SCORE_BITS = 32
MAX_TOKENS = 1 << INDEX_BITS
MAX_CLASSES = 1 << (63 - INDEX_BITS - SCORE_BITS)


def sortable(scores: Tensor) -> Tensor:
    """Map scores (any real dtype, compared as float32) to int64 in [0, 2^32) so that integer order is score order.

    NaN maps to 0, below -inf; -0.0 equals 0.0. Exact: no two different float32 values share an image.
    """
    value = scores.to(torch.float32)
    bits = torch.where(value == 0, 0.0, value).view(torch.int32).to(torch.int64)
    # IEEE bits order non-negative floats as integers, and negative ones the other way round. By arithmetic: runtimes
    # for exported models have no shifts of signed integers.
    ordered = torch.where(bits < 0, -1 - bits, bits + (1 << 31))
    return torch.where(value != value, 0, ordered)


def pack(classes: Tensor, scores: Tensor, allowed: Tensor) -> Tensor:
    """Unique int64 keys [B, N]: class first (greater wins), then score, then lowest index.

    Args:
        classes: int64 [B, N] in [0, MAX_CLASSES).
        scores: [B, N], real.
        allowed: bool [B, N]; elsewhere the score is ignored, so that only class and index decide.

    Integers cannot swallow a small difference as a float `score + BIG * class` does.
    """
    if _ranked.get():
        return _ranks(classes, scores, allowed)
    index = torch.arange(scores.shape[1], device=scores.device)
    value = torch.where(allowed, sortable(scores), 0)
    return (classes * (1 << SCORE_BITS) + value) * (1 << INDEX_BITS) + (MAX_TOKENS - 1 - index)


_ranked: ContextVar[bool] = ContextVar("ranked", default=False)


@contextmanager
def by_ranks() -> Iterator[None]:
    """While this lasts, `pack` sorts scores and numbers them, and gives other keys of the same order.

    For runtimes of exported models: the keys fit in 32 bits for as many as 2^23 tokens, and need no bits of floats.
    OpenVINO computes whole numbers in 32 bits whatever their type, and TensorRT's compiler may not end on many
    operations on single values in a row.
    """
    token = _ranked.set(True)
    try:
        yield
    finally:
        _ranked.reset(token)


def _ranks(classes: Tensor, scores: Tensor, allowed: Tensor) -> Tensor:
    """Unique int64 keys [B, N] in the order of those of `pack`: within a class what has a score, then by its rank."""
    tokens = scores.shape[1]
    value = scores.to(torch.float32)
    counts = allowed & (value == value)
    best = torch.where(counts, value, 0.0).sort(dim=1, descending=True, stable=True).indices
    falling = torch.arange(tokens - 1, -1, -1, device=scores.device).expand_as(best)
    place = torch.zeros_like(best).scatter(1, best, falling)
    return (classes * 2 + counts.to(torch.int64)) * tokens + place


def largest(keys: Tensor, k: int) -> Tensor:
    """Bool [B, N]: the k greatest of unique int64 keys [B, N] in each row. k may be symbolic; 0 <= k <= N.

    Only the k-th value of a top-k is used, never its indices: equal on every target, whatever its order of ties.
    Measured under Inductor on two CPU cores at [32, 196], [8, 576], [1, 4096]: 0.22, 0.21, 0.16 ms; a stable sort
    0.47, 0.43, 0.42 ms; ranks by pairwise comparison 0.50, 0.91 ms and, at 4,096, sixteen million comparisons a row.
    """
    count = keys.shape[1]
    torch._check(k >= 0, lambda: f"cannot select k={k} tokens: k must not be negative")
    torch._check(k <= count, lambda: f"cannot select k={k} of {count} tokens")
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    return keys >= keys.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def check_rows(scores: Tensor, masks: list[Tensor]) -> None:
    """Refuse scores that are not [B, N] and masks that are not bool of that shape. Raises ValueError."""
    if scores.dim() != 2:
        raise ValueError(f"scores must be [B, N], not {list(scores.shape)}")
    for mask in masks:
        if mask.dim() != 2 or mask.dtype != torch.bool:
            raise ValueError(f"a token mask must be bool [B, N], not {mask.dtype} {list(mask.shape)}")
