"""tokred::key_votes: what all heads together think of each key."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(query: Tensor, key: Tensor, valid: Tensor | None, first: int, last: int) -> Tensor:
    """Let each head share out one vote among the keys that are up for choice, and sum the votes.

    TokenSelect (Wu et al. 2024), section 4: softmax over the keys of query . key, without a factor 1/sqrt(D), summed
    over heads. Here it is float32 throughout, where the authors' code keeps scores and votes in bfloat16.

    Args:
        query: float [B, H, D].
        key: float [B, Hkv, N, D], H a multiple of Hkv (query head h reads key head h // (H // Hkv)).
        valid: bool [B, N], real tokens; None: all are.
        first, last: the first and the last so many real tokens of each row are not up for choice.

    Returns:
        float32 [B, 1, N]: of each row the votes sum to H, or to 0 where nothing is up for choice. Other keys have 0.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(query, key)
    batch, heads, tokens, width = key.shape
    grouped = query.to(torch.float32).reshape(batch, heads, -1, width)
    logits = grouped @ key.to(torch.float32).transpose(2, 3)
    open_to = candidates(valid, batch, tokens, first, last, key.device)[:, None, None]
    peak = torch.where(open_to, logits, -torch.inf).amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.where(open_to, torch.exp(logits - peak), 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights * torch.where(total > 0, 1 / total, 0.0)).sum((1, 2))[:, None]


def check(query: Tensor, key: Tensor) -> None:
    """Refuse shapes that do not fit. Raises ValueError."""
    if query.dim() != 3 or key.dim() != 4 or query.shape[1] % key.shape[1] or query.shape[2] != key.shape[3]:
        raise ValueError(
            f"query and key must be [B, H, D] and [B, Hkv, N, D], not {list(query.shape)} and {list(key.shape)}"
        )


def candidates(valid: Tensor | None, batch: int, tokens: int, first: int, last: int, device: torch.device) -> Tensor:
    """bool [B, N]: real tokens of each row without the first and the last so many."""
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if valid is None else valid
    rank = real.cumsum(1)
    return real & (rank > first) & (rank <= rank[:, -1:] - last)


key_votes = _library.define(
    "key_votes(Tensor query, Tensor key, Tensor? valid, int first, SymInt last) -> Tensor",
    reference,
    triton="triton_key_votes",
)
