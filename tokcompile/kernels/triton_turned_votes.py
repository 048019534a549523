"""turned_votes in Triton: keys are turned in registers, and what is kept of them is a logit for each head of queries.

A program goes through all heads of some tokens, whose angles it computes once. Votes are made of the logits by what
PyTorch has, which Inductor fuses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles, triton_turn_pairs
from ._triton import wrap_triton
from ._triton_gather import block, empty
from .key_votes import candidates, check
from .triton_turn_pairs import turning
from .turn_pairs import check as check_positions


def supports(
    query: Tensor,
    key: Tensor,
    here: Tensor,
    there: Tensor,
    frequencies: Tensor,
    start: int,
    neighbours: bool,
    coordinate: Sequence[int] | None,
    *others: object,
) -> str | None:
    """Why the kernel cannot run on these arguments; None when it can."""
    if any(each.dim() != 2 and each.shape[1] != 1 for each in (here, there)):
        return "heads that have positions of their own"
    unfit = _triton_tiles.unfit(query, key)
    return unfit or triton_turn_pairs.supports(key, here, there, frequencies, start, neighbours, coordinate)


def launch(
    query: Tensor,
    key: Tensor,
    here: Tensor,
    there: Tensor,
    frequencies: Tensor,
    start: int,
    neighbours: bool,
    coordinate: Sequence[int] | None,
    valid: Tensor | None,
    first: int,
    last: int,
) -> Tensor:
    """As the reference."""
    check(query, key)
    check_positions(here, there, frequencies, coordinate)
    batch, heads, tokens, width = key.shape
    logits = torch.empty((batch, query.shape[1], tokens), dtype=torch.float32, device=key.device)
    if not empty(logits.shape):
        pairs = frequencies.shape[-1]
        of_pairs = block(pairs, triton_turn_pairs.WIDEST)
        # Heads share their positions.
        (here_row, _, *here_steps), (there_row, _, *there_steps) = map(triton_turn_pairs.steps, (here, there))
        wrap_triton(_tuned)[lambda meta: (triton.cdiv(tokens, meta["TILE"] // of_pairs), batch)](
            query, key, here, there, frequencies, logits,
            *query.stride(), *key.stride(), here_row, *here_steps, there_row, *there_steps,
            heads, query.shape[1] // heads, tokens, width - 2 * pairs, pairs, start,
            **triton_turn_pairs.words(here, there, frequencies, coordinate),
            NEIGHBOURS=neighbours, PAIRS=of_pairs, REST=block(width - 2 * pairs, triton_turn_pairs.WIDEST),
        )  # fmt: skip
    return _shared_out(logits, candidates(valid, batch, tokens, first, last, key.device)[:, None])


def _shared_out(logits: Tensor, open_to: Tensor) -> Tensor:
    """Votes float32 [B, 1, N] of logits [B, H, N], as `key_votes` has them."""
    peak = torch.where(open_to, logits, -torch.inf).amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
    weights = torch.where(open_to, torch.exp(logits - peak), 0.0)
    total = weights.sum(-1, keepdim=True)
    return (weights * torch.where(total > 0, 1 / total, 0.0)).sum(1, keepdim=True)


@triton.jit
def _logits(
    query, key, here, there, frequencies, out,
    q_row, q_head, q_column, k_row, k_head, k_token, k_column,
    here_row, here_token, here_own, there_row, there_token, there_own, heads, group, tokens, rest, pairs, start,
    frequencies_row, frequencies_pair, c0, c1, c2, c3, c4, c5, c6, c7, c8, HERE: tl.constexpr, THERE: tl.constexpr,
    NEIGHBOURS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Products of the queries with some keys of all heads, each turned and rounded as `turn_pairs` does it."""
    SIZE: tl.constexpr = TILE // PAIRS
    row, token = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = token < tokens
    pair = tl.arange(0, PAIRS).to(tl.int64)
    there_are = pair < pairs
    cos, sin = turning(
        here, there, frequencies, row * here_row, row * there_row, row, token, inside, pair, there_are,
        here_token, here_own, there_token, there_own, frequencies_row, frequencies_pair,
        c0, c1, c2, c3, c4, c5, c6, c7, c8, HERE, THERE,
    )  # fmt: skip
    one = start + (2 * pair if NEIGHBOURS else pair)
    two = one + (1 if NEIGHBOURS else pairs)
    both = inside[:, None] & there_are[None, :]
    for head in range(heads):
        at = key + row * k_row + tl.cast(head, tl.int64) * k_head + token[:, None] * k_token
        first = tl.load(at + one[None, :] * k_column, mask=both, other=0).to(tl.float32)
        second = tl.load(at + two[None, :] * k_column, mask=both, other=0).to(tl.float32)
        turned = (first * cos - second * sin).to(key.dtype.element_ty).to(tl.float32)
        second = (second * cos + first * sin).to(key.dtype.element_ty).to(tl.float32)
        for own in range(head * group, head * group + group):
            q_at = query + row * q_row + tl.cast(own, tl.int64) * q_head
            left = tl.load(q_at + one * q_column, mask=there_are, other=0).to(tl.float32)
            right = tl.load(q_at + two * q_column, mask=there_are, other=0).to(tl.float32)
            found = tl.sum(turned * left[None, :] + second * right[None, :], 1)
            for begin in range(0, rest, REST):
                other = begin + tl.arange(0, REST).to(tl.int64)
                plain = other < rest
                other = tl.where(other < start, other, other + 2 * pairs)
                q = tl.load(q_at + other * q_column, mask=plain, other=0).to(tl.float32)
                k = tl.load(at + other[None, :] * k_column, mask=inside[:, None] & plain[None, :], other=0)
                found += tl.sum(k.to(tl.float32) * q[None, :], 1)
            tl.store(out + (row * heads * group + own) * tokens + token, found, mask=inside)


_tuned = _triton_tiles.autotuned(
    _logits, ("TILE",), triton_turn_pairs.TILES, ("NEIGHBOURS", "PAIRS", "HERE", "THERE"), triton_turn_pairs.WIDEST
)
