"""tokred::pair_scores: products of queries and keys over some of the pairs that a rotation turns."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(
    query: Tensor, key: Tensor, chosen: Tensor, valid: Tensor | None, start: int, pairs: int, neighbours: bool
) -> Tensor:
    """Score each key by the part of query . key that chosen pairs of numbers make.

    FASA (2026), section 3: a logit is a sum over frequencies, and a few of them rank the keys. Numbers that no position
    turns are no frequency, and count in any case: with all pairs chosen a score is query . key.

    Args:
        query: float [B, H, D].
        key: float [B, Hkv, N, D], H a multiple of Hkv (query head h reads key head h // (H // Hkv)).
        chosen: integers [G, n], or [B, G, n] where rows have their own, within [0, pairs), each at most once. G = H:
            each query head has scores of its own. G = Hkv: scores of the heads that share a key head are brought to
            mean 0 and variance 1, over its real keys, and summed.
        valid: bool [B, N], real tokens; None: all are.
        start: where in D the 2 * pairs numbers begin that are turned.
        pairs: how many pairs there are.
        neighbours: whether a pair is two numbers side by side (2 i, 2 i + 1), and not (i, i + pairs).

    Returns:
        float32 [B, G, N]. Where G = H = Hkv the scores are those of each head, as they are.

    Raises:
        ValueError: shapes that do not fit.
    """
    index = numbers(query, key, chosen, start, pairs, neighbours).expand(key.shape[0], -1, -1)
    batch, heads, tokens, width = key.shape
    groups = query.shape[1] // heads
    each = index.repeat_interleave(query.shape[1] // index.shape[1], 1)
    part = query.to(torch.float32).gather(2, each)
    if index.shape[1] == heads:
        keys = key.gather(3, index[:, :, None].expand(batch, heads, tokens, -1)).to(torch.float32)
        scores = part.reshape(batch, heads, groups, -1) @ keys.transpose(2, 3)
    else:
        spread = key[:, :, None].expand(batch, heads, groups, tokens, width)
        keys = spread.gather(4, each.reshape(batch, heads, groups, 1, -1).expand(batch, heads, groups, tokens, -1))
        scores = keys.to(torch.float32) @ part.reshape(batch, heads, groups, -1, 1)
    return joined(scores.reshape(batch, -1, tokens), heads, index.shape[1], valid)


def numbers(query: Tensor, key: Tensor, chosen: Tensor, start: int, pairs: int, neighbours: bool) -> Tensor:
    """int64 [B or 1, G, n']: the numbers of a head that chosen pairs are, and those that are in no pair.

    Raises:
        ValueError: shapes that do not fit.
    """
    heads, width = key.shape[1], key.shape[3]
    if chosen.dim() == 2:
        chosen = chosen[None]
    each_own = chosen.dim() == 3 and chosen.shape[1] in (heads, query.shape[1])
    if query.dim() != 3 or query.shape[1] % heads or not each_own:
        raise ValueError(
            f"query, key and chosen must be [B, H, D], [B, Hkv, N, D] and [H or Hkv, n], not {list(query.shape)}, "
            f"{list(key.shape)} and {list(chosen.shape)}"
        )
    chosen = chosen.to(torch.int64)
    ends = (2 * chosen, 2 * chosen + 1) if neighbours else (chosen, chosen + pairs)
    beside = (torch.arange(*span, device=chosen.device) for span in ((0, start), (start + 2 * pairs, width)))
    rest = torch.cat([*beside]).expand(chosen.shape[0], chosen.shape[1], -1)
    return torch.cat([*(start + end for end in ends), rest], 2)


def joined(scores: Tensor, heads: int, choices: int, valid: Tensor | None) -> Tensor:
    """Scores of each query head, [B, H, N], as the operator gives them: [B, choices, N]."""
    if choices != heads or scores.shape[1] == heads:
        return scores
    return _standard(scores.reshape(scores.shape[0], heads, -1, scores.shape[2]), valid).sum(2)


def _standard(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Bring scores [B, Hkv, G, N] to mean 0 and variance 1 over real tokens; equal scores become 0."""
    if valid is None:
        valid = torch.ones_like(scores[:, 0, 0], dtype=torch.bool)
    real = valid[:, None, None].to(torch.float32)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    off = scores - (scores * real).sum(-1, keepdim=True) / count
    spread = ((off * off * real).sum(-1, keepdim=True) / count).sqrt()
    return torch.where(spread > 0, off / spread, 0.0)


pair_scores = _library.define(
    "pair_scores(Tensor query, Tensor key, Tensor chosen, Tensor? valid, int start, int pairs, bool neighbours) "
    "-> Tensor",
    reference,
    triton="triton_pair_scores",
)
