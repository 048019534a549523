"""Kernels that select: exactly what their references choose, ties and specials of floats included."""

from __future__ import annotations

import pytest
import torch
from drawn import made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from launched import launched, strided
from torch import Tensor

from tokcompile.kernels import _triton_long_rows, _triton_select, kernel_fault, reference_of

SPECIALS = [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 1e-40, -1e-40, 3e38, float("inf"), -float("inf"), float("nan")]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
SEEDS = st.integers(0, 1000)
TOKENS = st.sampled_from([1, 5, 16, 40])


def scores(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Few values, so that most rows have ties."""
    which = torch.randint(0, len(SPECIALS), shape, generator=torch.Generator().manual_seed(seed))
    values = torch.tensor(SPECIALS, dtype=torch.float64)[which]
    values = values if dtype.is_floating_point else values.nan_to_num().clamp(-9, 9)
    return strided(values.to(dtype), seed % 3)


def mask(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Of some, all or no tokens."""
    share = (0.5, 0.0, 1.0, 0.2)[seed % 4]
    found = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    return strided(found, seed % 3)


def same(name: str, *args: object) -> None:
    found, wanted = launched(name, *args), reference_of(name)(*args)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


def budgets(tokens: int) -> st.SearchStrategy[int]:
    return st.integers(0, tokens) | st.sampled_from([0, tokens])


@settings(max_examples=25)
@given(TOKENS, DTYPES, SEEDS, st.booleans(), st.data())
def test_top_k(tokens, dtype, seed, every, data):
    k = data.draw(budgets(tokens))
    same("topk_mask", scores(seed, (2, tokens), dtype), None if every else mask(seed, (2, tokens)), k)


@settings(max_examples=12)
@given(DTYPES, SEEDS, st.sampled_from([(4, 6, 2, 3), (4, 6, 1, 1), (6, 4, 3, 1), (1, 5, 1, 5)]), st.data())
def test_windows(dtype, seed, grid, data):
    height, width, rows, columns = grid
    k = data.draw(budgets((height // rows) * (width // columns)))
    same("window_topk_mask", scores(seed, (2, height * width), dtype), *grid, k)


@settings(max_examples=20)
@given(TOKENS, st.integers(0, 4), SEEDS, st.booleans(), st.data())
def test_budgets_with_groups_first(tokens, groups, seed, every, data):
    first = [mask(seed + n, (2, tokens)) for n in range(groups)]
    among = None if every else mask(seed + 9, (2, tokens))
    same("fill_mask", first, scores(seed, (2, tokens), torch.float32), among, data.draw(budgets(tokens)))


FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=25)
@given(TOKENS, FLOATS, DTYPES, SEEDS, st.booleans(), st.data())
def test_walks(tokens, dtype, order, seed, every, data):
    """Distances with ties, infinities and NaN, in which a walk may not even be symmetric."""
    among = None if every else mask(seed, (2, tokens))
    apart, start = scores(seed, (2, tokens, tokens), dtype), scores(seed + 1, (2, tokens), order)
    same("farthest_mask", apart, start, among, data.draw(budgets(tokens)))


@settings(max_examples=20)
@given(TOKENS, DTYPES, SEEDS, st.booleans(), st.booleans(), st.integers(0, 3), st.integers(0, 3), st.data())
def test_keys_that_stay(tokens, dtype, seed, padded, among, first, last, data):
    masks = [mask(seed + n, (2, tokens)) if given else None for n, given in enumerate((padded, among))]
    same("keep_keys", scores(seed, (2, 3, tokens), dtype), *masks, first, last, data.draw(budgets(tokens)))


@settings(max_examples=30)
@given(TOKENS, SEEDS, st.sampled_from([0, 1, 7, 60]))
def test_indices(tokens, seed, length):
    same("kept_indices", mask(seed, (3, tokens)), length)


def test_long_rows():
    """Rows that fill their block in part, and indices that go through several blocks."""
    long = scores(0, (1, 1500), torch.float32)
    same("topk_mask", long, None, 700)
    same("kept_indices", mask(0, (2, 5000)), 2100)


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 16 tokens count as long ones, in parts of 16 tokens; of more than 200, in 32 parts."""
    monkeypatch.setattr(_triton_select, "MOST", 16)
    monkeypatch.setattr(_triton_long_rows, "PART", 16)
    monkeypatch.setattr(_triton_long_rows, "LONG", 200)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize(("first", "last", "k"), [(1100, 300, 2000), (3, 9, 2), (0, 0, 1000), (0, 1, 5000)])
def test_keys_that_stay_of_rows_of_several_pieces(padded, among, first, last, k):
    """Rows of several pieces, whose ends, ties and slots are counted from one piece to the next."""
    masks = [mask(4 * n, (1, 5000)) if given else None for n, given in enumerate((padded, among))]
    found = scores(0, (1, 2, 5000), torch.float32)
    found[:, 0] = made(1, 5000)
    same("keep_keys", found, *masks, first, last, k)


LONG = st.sampled_from([17, 100, 128, 129, 203, 520])
"""Tokens: in one part, in some of eight, in all of them, in one more than that, and in several turns of each."""


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LONG, DTYPES, SEEDS, st.booleans(), st.data())
def test_top_k_of_long_rows(many_parts, tokens, dtype, seed, every, data):
    k = data.draw(budgets(tokens))
    same("topk_mask", scores(seed, (2, tokens), dtype), None if every else mask(seed, (2, tokens)), k)


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LONG, st.integers(0, 4), SEEDS, st.booleans(), st.data())
def test_long_rows_with_groups_first(many_parts, tokens, groups, seed, every, data):
    first = [mask(seed + n, (2, tokens)) for n in range(groups)]
    among = None if every else mask(seed + 9, (2, tokens))
    same("fill_mask", first, scores(seed, (2, tokens), torch.float32), among, data.draw(budgets(tokens)))


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LONG, DTYPES, SEEDS, st.booleans(), st.booleans(), st.integers(0, 30), st.integers(0, 30), st.data())
def test_keys_of_long_rows_that_stay(many_parts, tokens, dtype, seed, padded, among, first, last, data):
    masks = [mask(seed + n, (2, tokens)) if given else None for n, given in enumerate((padded, among))]
    same("keep_keys", scores(seed, (2, 2, tokens), dtype), *masks, first, last, data.draw(budgets(tokens)))


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LONG, SEEDS, st.data())
def test_random_scores_of_long_rows(many_parts, tokens, seed, data):
    """Which differ in each of the four digits that are counted."""
    random = torch.randn(1, 2, tokens, generator=torch.Generator().manual_seed(seed))
    same("keep_keys", random, None, None, 3, 5, data.draw(budgets(tokens)))


def test_rows_that_are_longer_than_a_program_holds():
    """At their real sizes."""
    random = torch.randn(1, 70000, generator=torch.Generator().manual_seed(0))
    for tokens in (16385, 70000):
        same("topk_mask", random[:, :tokens], None, 4096)
        same("keep_keys", random[:, None, :tokens], None, None, 128, 512, 4096)


def test_what_a_kernel_does_not_hold_is_left_to_the_reference():
    assert "windows of 16641 tokens" in kernel_fault("window_topk_mask", (torch.zeros(1, 16641), 129, 129, 1, 1, 3))
    assert kernel_fault("window_topk_mask", (torch.zeros(1, 16384), 128, 128, 1, 1, 3)) is None
    assert "without tokens" in kernel_fault("topk_mask", (torch.zeros(1, 0), None, 0))
    assert "priority groups" in kernel_fault("fill_mask", ([torch.zeros(1, 4).bool()] * 5, torch.zeros(1, 4), None, 1))
