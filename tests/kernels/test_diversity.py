"""token_distances, nearest_distance, farthest_mask: against loops over tokens, and by what a walk must do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import spread_out
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
VALUES = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1.0 + 2**-23, 2.0, float("inf"), float("nan")])


@st.composite
def walks(draw):
    """Distances that need not be symmetric, where to begin, tokens up for choice, and how many."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    flat = batch * tokens
    apart = torch.tensor(draw(st.lists(VALUES, min_size=flat * tokens, max_size=flat * tokens)))
    start = torch.tensor(draw(st.lists(VALUES, min_size=flat, max_size=flat)))
    among = torch.tensor(draw(st.lists(st.booleans(), min_size=flat, max_size=flat)))
    among = draw(st.sampled_from([None, among.view(batch, tokens)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    return apart.view(batch, tokens, tokens).to(dtype), start.view(batch, tokens), among, draw(st.integers(0, tokens))


def walked(apart: Tensor, start: Tensor, inside: Tensor, k: int) -> list[int]:
    """One row, step by step; NaN is below all, and stays."""
    far, walk = start.tolist(), []
    for step in range(k):
        free = [i for i in range(len(far)) if i not in walk]
        best = [i for i in free if inside[i]] or free[:1]
        walk.append(max(best, key=lambda i: (far[i] == far[i], far[i] if far[i] == far[i] else 0, -i)))
        row = apart[walk[-1]].tolist()
        pairs = zip(far, row, strict=True)
        far = row if step == 0 else [min(a, b) if a == a and b == b else torch.nan for a, b in pairs]
    return sorted(walk)


@settings(max_examples=200, deadline=None)
@given(walks())
def test_a_walk_goes_to_the_farthest_token_each_time(case):
    apart, start, among, k = case
    mask = ops.farthest_mask(apart, start, among, k)
    for row, kept in enumerate(mask):
        inside = torch.ones_like(start[row], dtype=torch.bool) if among is None else among[row]
        assert kept.nonzero().flatten().tolist() == walked(apart[row].float(), start[row], inside, k)


def chosen(x: Tensor, k: int, among: Tensor | None = None) -> list[int]:
    apart = ops.token_distances(x[None])
    among = None if among is None else among[None]
    return ops.farthest_mask(apart, ops.nearest_distance(apart, among), among, k)[0].nonzero().flatten().tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([1e-20, 1.0, 1e20]), st.data())
def test_tokens_are_spread_out_whatever_their_lengths(seed, tokens, size, data):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 8, generator=generator)
    k = data.draw(st.integers(0, tokens))
    scaled = x * size * (0.5 + torch.rand(tokens, 1, generator=generator))
    assert chosen(scaled, k) == sorted(spread_out(scaled.double(), k))


def test_orthogonal_tokens_are_ties_and_go_by_index():
    assert chosen(torch.eye(6), 3) == [0, 1, 2]


def test_two_clusters_give_one_token_each():
    generator = torch.Generator().manual_seed(0)
    x = torch.eye(8)[[0, 0, 0, 0, 1, 1, 1]] + 1e-3 * torch.randn(7, 8, generator=generator)
    first, second = chosen(x, 2)
    assert first < 4 <= second


def test_one_token_is_the_loneliest_and_all_are_all():
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.1]])
    assert chosen(x, 1) == [2]
    assert chosen(x, 4) == [0, 1, 2, 3]


def test_equal_tokens_are_not_chosen_twice_and_zeros_have_a_distance():
    x = torch.zeros(5, 3)
    x[:3] = torch.tensor([1.0, 2.0, 3.0])
    assert len(set(chosen(x, 4))) == 4
    assert torch.equal(ops.token_distances(x[None])[0, 3], torch.ones(5))


def test_tokens_that_are_not_up_for_choice_are_no_neighbours():
    x = torch.eye(4)[[0, 0, 1, 1, 2]]
    among = torch.tensor([True, False, True, True, False])
    nearest = ops.nearest_distance(ops.token_distances(x[None]), among[None])
    assert nearest[0].tolist() == [1, torch.inf, 0, 0, torch.inf]
    assert chosen(x, 2, among) == [0, 2]
    assert chosen(x, 4, among) == [0, 1, 2, 3]


def test_wrong_arguments_are_refused():
    apart, start = torch.zeros(2, 3, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="distances must be"):
        ops.farthest_mask(torch.zeros(2, 3, 4), start, None, 1)
    with pytest.raises(ValueError, match="start must be"):
        ops.farthest_mask(apart, torch.zeros(2, 4), None, 1)
    with pytest.raises(ValueError, match="token mask must be"):
        ops.nearest_distance(apart, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="x must be"):
        ops.token_distances(torch.zeros(3, 4))
    for k in (-1, 4):
        with pytest.raises(RuntimeError, match=f"k={k}"):
            ops.farthest_mask(apart, start, None, k)
