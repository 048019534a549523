"""Operators of evictions at every step: against lists and loops, and the figures of a method's specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


def on_a_list(scores: list[float], turn: int, first: int, last: int, k: int) -> list[int]:
    """TreeKV (He et al. 2025), Algorithm 1: idx, from 1, walks over the keys that compete."""
    left, size = list(range(len(scores))), k - first - last
    while len(left) > k:
        idx = turn % size + 1
        one, other = first + idx - 1, first + idx
        del left[other if scores[left[one]] > scores[left[other]] else one]
        turn += 1
    return left


def one_by_one(scores: list[float], size: int) -> list[int]:
    """Tokens arrive one after the other, and each that is too many makes one go; places from 1."""
    cache: list[int] = []
    for token in range(len(scores)):
        cache.append(token)
        if len(cache) > size:
            row = torch.tensor([[[scores[j] for j in cache]]])
            gone = torch.tensor([token - size])
            stay = ops.pairwise_keys(row, None, gone, 0, 0, size, 1)[0, 0].tolist()
            cache = [cache[j] for j in stay]
    return [token + 1 for token in cache]


def at_once(scores: list[float], size: int) -> list[int]:
    row = torch.tensor([[scores]])
    start = torch.zeros(1, dtype=torch.int64)
    stay = ops.pairwise_keys(row, None, start, 0, 0, size, max(len(scores) - size, 0))
    return (stay[0, 0] + 1).tolist()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 40),
    first=st.integers(0, 2),
    last=st.integers(0, 3),
    size=st.integers(1, 7),
    turn=st.integers(0, 20),
    padding=st.booleans(),
    ties=st.booleans(),
)
def test_pairs_are_compared_as_on_a_list(
    seed: int, tokens: int, first: int, last: int, size: int, turn: int, padding: bool, ties: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, tokens, generator=generator)
    scores = scores.round() if ties else scores
    real = torch.rand(2, tokens, generator=generator) > 0.3 if padding else None
    k = min(first + last + size, tokens)
    if tokens < first + last + size:
        turn = 0
    turns = torch.tensor([turn, turn + 1])
    got = ops.pairwise_keys(scores, real, turns, first, last, k, tokens - k)
    assert got.shape == (2, 3, k) and got.dtype == torch.int64
    for row in range(2):
        places = [j for j in range(tokens) if real is None or real[row, j]]
        for head in range(3):
            if len(places) <= k:
                assert set(places) <= set(got[row, head].tolist())
                continue
            own = [float(scores[row, head, j]) for j in places]
            want = on_a_list(own, int(turns[row]), first, last, k)
            assert got[row, head].tolist() == [places[j] for j in want]


KEEP_RIGHT = {
    (4, 9): [4, 6, 8, 9],
    (4, 13): [8, 10, 12, 13],
    (4, 17): [12, 14, 16, 17],
    (8, 64): [40, 48, 52, 56, 58, 60, 62, 64],
}
KEEP_LEFT = {(4, 9): [1, 5, 7, 9], (4, 17): [1, 13, 15, 17], (8, 64): [1, 41, 49, 53, 57, 59, 61, 63]}


@pytest.mark.parametrize("run", [one_by_one, at_once])
@pytest.mark.parametrize(
    ("scores", "size", "want"),
    [
        *(([0.0] * tokens, size, want) for (size, tokens), want in KEEP_RIGHT.items()),
        *(([-float(t) for t in range(tokens)], size, want) for (size, tokens), want in KEEP_LEFT.items()),
        ([float(t % 5) for t in range(1, 18)], 4, [9, 14, 16, 17]),
        ([float(7 * t % 11) for t in range(1, 65)], 8, [36, 47, 50, 53, 58, 59, 61, 64]),
        ([3.0, 1.0], 2, [1, 2]),
        ([1.0, 2.0, 3.0, 1.0], 1, [3]),
    ],
)
def test_figures_of_the_specification(run: object, scores: list[float], size: int, want: list[int]) -> None:
    """Equal scores keep the right one of each pair, falling ones the left: ids from 1."""
    assert run(scores, size) == want


@pytest.mark.parametrize("run", [one_by_one, at_once])
def test_the_papers_figure(run: object) -> None:
    """Capacity 4 and 17 tokens, of which these lose, in this order: [2, 14, 15, 17] are left."""
    losers = [1, 4, 6, 7, 3, 5, 10, 11, 8, 12, 13, 16, 9]
    scores = [float(losers.index(t) if t in losers else 99) for t in range(1, 18)]
    assert run(scores, 4) == [2, 14, 15, 17]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    queries=st.integers(1, 6),
    more=st.integers(0, 3),
    window=st.integers(0, 4),
    causal=st.booleans(),
    masked=st.sampled_from([None, "bool", "float"]),
    padding=st.booleans(),
)
def test_viewers_are_counted_as_in_loops(
    seed: int, queries: int, more: int, window: int, causal: bool, masked: str | None, padding: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = queries + more
    query, key = torch.randn(2, 4, queries, 3, generator=generator), torch.randn(2, 2, keys, 3, generator=generator)
    shown = torch.rand(2, 1, queries, keys, generator=generator) > 0.3
    real = torch.rand(2, queries, generator=generator) > 0.3 if padding else None
    mask: Tensor | None = None
    if masked is not None:
        mask = shown if masked == "bool" else torch.zeros(shown.shape).masked_fill(~shown, torch.finfo().min)
    got = ops.key_viewers(query, key, mask, real, window, causal)
    for row in range(2):
        counted = [i for i in range(queries) if real is None or real[row, i]]
        counted = counted[-window:] if window else counted
        for j in range(keys):
            seen = [i for i in counted if (mask is None or shown[row, 0, i, j]) and (not causal or j <= i)]
            assert got[row, j] == len(seen)


def test_what_does_not_fit_is_refused() -> None:
    scores, turn = torch.zeros(1, 2, 4), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="scores and turn"):
        ops.pairwise_keys(scores[0], None, turn, 0, 0, 2, 2)
    with pytest.raises(ValueError, match="must not be negative"):
        ops.pairwise_keys(scores, None, turn, -1, 0, 2, 2)
    with pytest.raises(ValueError, match="valid must be bool"):
        ops.key_viewers(scores[None], scores[None], None, torch.ones(1, 2), 0, False)
