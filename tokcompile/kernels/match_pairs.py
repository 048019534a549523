"""tokred::match_pairs: which tokens of a sequence are most alike, by bipartite soft matching."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(metric: Tensor, count: int, leading: int) -> Tensor:
    """Pair even with odd tokens, and choose the `count` pairs that are most alike.

    Each even token is matched with the odd token of largest cosine similarity; of these matches the best are pairs:
    their even tokens are to be merged into their odd ones (Bolya et al., "Token Merging", section 3).

    Args:
        metric: [B, T, D]; what likeness is measured by, compared in float32.
        count: pairs, at most (T - leading) // 2.
        leading: tokens at the front that are neither merged nor merged into: class and register tokens.

    Returns:
        int64 [B, T + count], three lists one after the other: T - count tokens that stay, `count` that are merged, and
        for each of those the place in the first list of the token it is merged into. Of the tokens that stay leading
        ones come first, then even ones, then odd ones. Even ones stand in the order of their places, or where nothing
        leads the sequence in the order of their likeness, best first. The lower index wins a tie. Without pairs all
        tokens stay in their places.

    Raises:
        ValueError: metric is not [B, T, D], or there are not so many pairs.
    """
    check(metric, count, leading)
    batch, tokens, _ = metric.shape
    if count == 0:
        return torch.arange(tokens, device=metric.device).expand(batch, tokens).contiguous()
    metric = metric.detach().to(torch.float32)
    length = metric.norm(dim=-1, keepdim=True)
    metric = metric / torch.where(length > 0, length, 1.0)
    even, odd = metric[:, ::2], metric[:, 1::2]
    odds, kept = odd.shape[1], leading // 2
    alike = (even @ odd.transpose(1, 2))[:, :, kept:]
    best = alike.amax(-1)
    index = torch.arange(odds - kept, device=metric.device)
    partner = torch.where(alike == best[:, :, None], index, odds).amin(-1) + kept
    return paired(best, partner, tokens, count, leading)


def check(metric: Tensor, count: int, leading: int) -> None:
    """Refuse arguments of the operator that do not fit. Raises ValueError."""
    if metric.dim() != 3:
        raise ValueError(f"metric must be [B, T, D], not {list(metric.shape)}")
    tokens = metric.shape[1]
    if count < 0 or 2 * count > max(tokens - leading, 0):
        raise ValueError(f"no {count} pairs among {tokens} tokens of which the first {leading} are protected")


def paired(best: Tensor, partner: Tensor, tokens: int, count: int, leading: int) -> Tensor:
    """The lists of the result, where `partner` is the odd token of each even one and `best` how alike they are.

    best is float [B, evens]; partner int64 [B, evens], within the odd tokens.
    """
    batch, evens = best.shape
    odds = tokens // 2
    held, kept = (leading + 1) // 2, leading // 2  # leading tokens among the even and the odd ones
    ranked = best[:, held:].sort(dim=1, descending=True, stable=True).indices + held
    given, stays = ranked[:, :count], ranked[:, count:]
    if leading:
        stays = stays.sort(dim=1).values
    first = torch.arange(leading, device=best.device).expand(batch, leading)
    rest = (torch.arange(kept, odds, device=best.device) * 2 + 1).expand(batch, odds - kept)
    into = partner.gather(1, given) - kept + (leading + evens - held - count)
    return torch.cat([first, stays * 2, rest, given * 2, into], 1)


match_pairs = _library.define(
    "match_pairs(Tensor metric, int count, int leading) -> Tensor", reference, triton="triton_match_pairs"
)
