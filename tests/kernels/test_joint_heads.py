"""Operators of heads that share a budget: against loops over rows, heads and tokens."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from drawn import made, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
Pair = tuple[int, int]


def by_hand(
    scores: Tensor, real: list[int], among: list[bool], first: int, last: int, k: int, floor: Fraction, floor_by: str
) -> list[Pair]:
    """Pairs of a head and a token of one row [H, T], sorted."""
    heads, tokens = scores.shape
    ends = {*real[:first], *(real[-last:] if last else ())}

    def rank(j: int) -> int:
        return 2 if j in ends or not among[j] else 1 if j in real else 0

    def order(pair: Pair, sure: set[Pair]) -> Any:
        head, j = pair
        kind = 2 if pair in sure else rank(j)
        return (-kind, -float(scores[head, j]) if rank(j) else 0.0, j, head)

    every = [(head, j) for head in range(heads) for j in range(tokens)]
    own = [sorted((p for p in every if p[0] == head), key=lambda p: order(p, set())) for head in range(heads)]
    if floor_by == "reserve":
        count = max(k * floor.numerator // floor.denominator, 1) if k else 0
        sure = {p for pairs in own for p in pairs[:count] if rank(p[1])}
        return sorted(sorted(every, key=lambda p: order(p, sure))[: heads * k])
    won = sorted(every, key=lambda p: order(p, set()))[: heads * k]
    exact = [sum(p[0] == head for p in won) * (1 - floor) + k * floor for head in range(heads)]
    counts = [math.floor(value) for value in exact]
    for head in sorted(range(heads), key=lambda h: (counts[h] - exact[h], h))[: heads * k - sum(counts)]:
        counts[head] += 1
    return sorted(p for pairs, count in zip(own, counts, strict=True) for p in pairs[:count])


@settings(max_examples=120)
@given(
    seed=st.integers(0, 999),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 9),
    first=st.integers(0, 2),
    last=st.integers(0, 2),
    share=st.floats(0, 1),
    floor=st.sampled_from([Fraction(0), Fraction(1, 5), Fraction(1, 3), Fraction(1, 2), Fraction(1)]),
    floor_by=st.sampled_from(["blend", "reserve"]),
    padding=st.booleans(),
    some=st.booleans(),
    ties=st.booleans(),
)
def test_keep_pairs(
    seed: int,
    heads: int,
    tokens: int,
    first: int,
    last: int,
    share: float,
    floor: Fraction,
    floor_by: str,
    padding: bool,
    some: bool,
    ties: bool,
) -> None:
    scores = made(seed, 2, heads, tokens)
    scores = scores.round() if ties else scores
    real = padded(seed, 2, tokens) if padding else None
    among = padded(seed + 7, 2, tokens) if some else None
    least = min(tokens, first + last + (tokens - int(among.sum(1).min()) if some else 0))
    k = max(round(share * tokens), least)  # room for what stays
    got = ops.keep_pairs(scores, real, among, first, last, k, floor.numerator, floor.denominator, floor_by)
    owners = ops.pair_owners(got, real, tokens)
    assert got.shape == owners.shape == (2, heads, k) and got.dtype == owners.dtype == torch.int64
    for row in range(2):
        places = [j for j in range(tokens) if real is None or real[row, j]]
        mine = [among is None or bool(among[row, j]) for j in range(tokens)]
        want = by_hand(scores[row], places, mine, first, last, k, floor, floor_by)
        assert [divmod(pair, tokens) for pair in got[row].flatten().tolist()] == want
        assert owners[row].flatten().tolist() == [head if j in places else -1 for head, j in want]
        if not some:  # padding stays only beside all real tokens
            assert sum(j in places for _, j in want) == min(len(places), k) * heads


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 9),
    share=st.floats(0, 1),
    ties=st.booleans(),
    floor_by=st.sampled_from(["blend", "reserve"]),
)
def test_a_whole_floor_is_a_choice_of_each_head_and_equal_heads_keep_equally_many(
    seed: int, tokens: int, share: float, ties: bool, floor_by: str
) -> None:
    scores = made(seed, 2, 3, tokens)
    scores = scores.round() if ties else scores
    k = round(share * tokens)
    own = ops.keep_keys(scores, None, None, 0, 1 if k else 0, k)
    pairs = ops.keep_pairs(scores, None, None, 0, 1 if k else 0, k, 1, 1, floor_by)
    assert torch.equal(pairs, own + torch.arange(3)[:, None] * tokens)
    same = scores[:, :1].expand(2, 3, tokens)
    pairs = ops.keep_pairs(same, None, None, 0, 0, k, 0, 1, floor_by)
    assert torch.equal(pairs // max(tokens, 1), torch.arange(3)[None, :, None].expand(2, 3, k))


@settings(max_examples=40)
@given(seed=st.integers(0, 999), part=st.integers(0, 4), floor_by=st.sampled_from(["blend", "reserve"]))
def test_sums_are_exact_and_no_head_has_less_than_its_floor(seed: int, part: int, floor_by: str) -> None:
    scores = made(seed, 2, 5, 13) * torch.arange(1, 6)[:, None]
    pairs = ops.keep_pairs(scores, None, None, 0, 0, 6, part, 4, floor_by)
    assert all(len({*row.flatten().tolist()}) == 30 for row in pairs)
    counts = torch.nn.functional.one_hot(ops.pair_owners(pairs, None, 13), 5).sum((1, 2))
    assert (counts.sum(1) == 30).all() and (counts >= 6 * part // 4).all()


def test_a_flat_head_gets_more_than_a_peaked_one() -> None:
    peaked, flat = torch.full((16,), 0.01), torch.full((16,), 1 / 16)
    peaked[3] = 0.85
    scores = torch.stack([peaked, flat])[None]
    owners = ops.pair_owners(ops.keep_pairs(scores, None, None, 0, 0, 5, 0, 1, "blend"), None, 16)
    assert owners.flatten().tolist() == [0] + [1] * 9
    owners = ops.pair_owners(ops.keep_pairs(scores, None, None, 0, 0, 5, 1, 2, "blend"), None, 16)
    assert owners.flatten().tolist() == [0] * 3 + [1] * 7
    owners = ops.pair_owners(ops.keep_pairs(scores, None, None, 0, 0, 5, 1, 2, "reserve"), None, 16)
    assert owners.flatten().tolist() == [0] * 2 + [1] * 8


def test_gathered_pairs_free_the_longer_cache() -> None:
    cache = made(0, 2, 9, 3, 4).transpose(1, 2)
    pairs = torch.tensor([[1, 8], [9, 20], [25, 26]]).expand(2, 3, 2)
    got = ops.gather_pairs(cache, pairs)
    assert got.is_contiguous() and got.untyped_storage().nbytes() == got.numel() * 4
    assert torch.equal(got[1].flatten(0, 1), cache[1].flatten(0, 1)[[1, 8, 9, 20, 25, 26]])


def _masked(kind: str, seed: int, rows: int, heads: int, queries: int, columns: int) -> Tensor | None:
    """What queries see of the last columns: each sees the last."""
    if kind == "none":
        return None
    seen = made(seed, rows, heads, queries, columns) > 0
    seen[..., -1] = True
    return seen if kind == "bool" else torch.where(seen, 0.0, torch.finfo(torch.float32).min)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 999),
    groups=st.integers(1, 2),
    slots=st.integers(1, 3),
    queries=st.integers(1, 3),
    held=st.integers(0, 4),
    kind=st.sampled_from(["none", "bool", "float"]),
    by_head=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    sunk=st.booleans(),
)
def test_attend_owned(
    seed: int,
    groups: int,
    slots: int,
    queries: int,
    held: int,
    kind: str,
    by_head: bool,
    softcap: float,
    sunk: bool,
) -> None:
    heads, columns = groups * slots, held + queries
    query = made(seed, 2, heads, queries, 4)
    key, value = made(seed + 1, 2, slots, columns, 4), made(seed + 2, 2, slots, columns, 3)
    owners = torch.randint(-1, slots, (2, slots, columns), generator=torch.Generator().manual_seed(seed))
    owners[:, :, held:] = torch.arange(slots)[:, None]  # each row's last slots are its own
    mask = _masked(kind, seed, 1 + seed % 2, heads if by_head else 1, queries, queries)
    sinks = made(seed + 3, heads) if sunk else None
    got = ops.attend_owned(query, key, value, owners, mask, 0.7, softcap, sinks)
    assert got.shape == (2, heads, queries, 3)
    seen = torch.ones(2, heads, queries, queries, dtype=torch.bool)
    if mask is not None:
        seen = (mask if mask.dtype == torch.bool else mask == 0).expand(2, heads, queries, queries)
    for row in range(2):
        for head in range(heads):
            for i in range(queries):
                logits, values = [], []
                for slot in range(slots):
                    for j in range(columns):
                        hidden = j >= held and not seen[row, head, i, j - held]
                        if owners[row, slot, j] != head // groups or hidden:
                            continue
                        logit = float(query[row, head, i].double() @ key[row, slot, j].double()) * 0.7
                        logits.append(math.tanh(logit / softcap) * softcap if softcap else logit)
                        values.append(value[row, slot, j].double())
                total = sum(map(math.exp, logits)) + (math.exp(float(sinks[head])) if sinks is not None else 0)
                want = sum(math.exp(logit) / total * v for logit, v in zip(logits, values, strict=True))
                torch.testing.assert_close(got[row, head, i].double(), want, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    scores, cache = made(0, 1, 2, 5), made(0, 1, 2, 5, 4)
    with pytest.raises(ValueError, match="floor_by must be one of blend, reserve"):
        ops.keep_pairs(scores, None, None, 0, 0, 2, 1, 2, "mean")
    with pytest.raises(ValueError, match="from 0 to 1"):
        ops.keep_pairs(scores, None, None, 0, 0, 2, 3, 2, "blend")
    with pytest.raises(RuntimeError, match="cannot select"):
        ops.keep_pairs(scores, None, None, 0, 0, 6, 0, 1, "blend")
    with pytest.raises(ValueError, match="cache and pairs must be"):
        ops.gather_pairs(cache, torch.zeros(1, 1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="query heads do not divide"):
        ops.attend_owned(made(0, 1, 3, 1, 4), cache, cache, torch.zeros(1, 2, 5, dtype=torch.int64), None, 1.0, 0.0)
