"""What `tokred bench --kernels` times beside a kernel: what PyTorch brings for the job, and what methods usually run.

Each takes the arguments of the operator and gives a call without arguments, so that only the call is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

Rival = Callable[..., Callable[[], Any]]


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> Callable[[], Tensor]:
    """The output of attention, which is all that it gives: PyTorch picks flash attention where it can."""
    return lambda: scaled_dot_product_attention(query, key, value, mask, 0.0, causal, scale=scale, enable_gqa=True)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, mask: Tensor | None = None
) -> Callable[[], Tensor]:
    """The same by `flex_attention`; of a mask [1, 1, Tq, Tk], which stands for a causal one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sizes = query.shape[2], key.shape[2]
    below = lambda batch, head, row, column: row >= column  # noqa: E731
    seen = below if mask is None else lambda batch, head, row, column: mask[0, 0, row, column]
    some = causal or mask is not None
    block = create_block_mask(seen, None, None, *sizes, device=query.device) if some else None
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(query, key, value, block_mask=block, scale=scale, enable_gqa=True)


def _weights(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention weights float32 [B, H, Tq, Tk], which `output_attentions=True` stores."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(2, 3) * scale
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32)


def _of_site(rival: Callable[..., Callable[[], Tensor]]) -> Rival:
    """Of an operator on queries and keys: keys stand for values."""
    return lambda q, k, mask, rows, scale, causal, *rest: rival(q, k, k, scale, causal)


def _of_masked(rival: Callable[..., Callable[[], Tensor]]) -> Rival:
    return lambda q, k, v, mask, scale, causal, *rest: rival(q, k, v, scale, causal, mask)


def _of_step(rival: Callable[..., Callable[[], Tensor]]) -> Rival:
    return lambda q, k, v, mask, scale, *rest: rival(q, k, v, scale, False)


def _of_list(rival: Callable[..., Callable[[], Tensor]]) -> Rival:
    """All keys, and not those that are listed."""
    return lambda q, k, v, mask, index, scale, *rest: rival(q, k, v, scale, False)


def _all_weights(q: Tensor, k: Tensor, mask: Any, rows: Any, scale: float, causal: bool, *rest: Any) -> Any:
    return lambda: _weights(q, k, scale, causal).mean((1, 2))


def _one_row(q: Tensor, k: Tensor, mask: Any, index: Tensor, scale: float, causal: bool, *rest: Any) -> Any:
    return lambda: _weights(q, k, scale, causal).mean(1)[torch.arange(len(index), device=q.device), index]


def _gathered(q: Tensor, k: Tensor, v: Tensor, mask: Any, index: Tensor, scale: float, *rest: Any) -> Any:
    """The chosen keys are copied first."""

    def call() -> Tensor:
        chosen = (each.gather(2, index[..., None].expand(-1, -1, -1, each.shape[3])) for each in (k, v))
        return scaled_dot_product_attention(q, *chosen, scale=scale, enable_gqa=True)

    return call


def _matched(metric: Tensor, count: int, leading: int) -> Any:
    """The matrix of all likenesses is stored, and sorted by."""

    def call() -> tuple[Tensor, Tensor]:
        unit = normalize(metric, dim=-1)
        best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(-1)
        order = best.argsort(-1, descending=True)
        return order, partner.gather(1, order[:, :count])

    return call


def _top(scores: Tensor, among: Any, k: int) -> Any:
    return lambda: torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(k, dim=1).indices, True)


def _kept(scores: Tensor, valid: Any, among: Any, first: int, last: int, k: int) -> Any:
    """Of rows without padding, and without ends that stay."""
    return lambda: scores.topk(k, dim=2).indices.sort(2).values


def _keys(cache: Tensor, index: Tensor) -> Any:
    return lambda: cache.gather(2, index[..., None].expand(-1, -1, -1, cache.shape[3]))


def _tokens(x: Tensor, source: Tensor, dim: int, batch: int) -> Any:
    return lambda: x[torch.arange(x.shape[0], device=x.device)[:, None], source]


RIVALS: dict[str, dict[str, Rival]] = {
    "attend": {"sdpa": _of_step(_sdpa), "flex": _of_step(_flex)},
    "attend_chosen": {"sdpa, all keys": _of_list(_sdpa), "gather and sdpa": _gathered},
    "attend_with_sums": {"sdpa": _of_masked(_sdpa), "flex": _of_masked(_flex)},
    "attention_received": {"sdpa": _of_site(_sdpa), "flex": _of_site(_flex), "all weights": _all_weights},
    "attention_row": {"all weights": _one_row},
    "gather_keys": {"gather": _keys},
    "gather_tokens": {"indexing": _tokens},
    "keep_keys": {"top-k and sort": _kept},
    "match_pairs": {"all likenesses": _matched},
    "topk_mask": {"top-k and scatter": _top},
}
"""By the operator's name, and what it is called in the table."""
