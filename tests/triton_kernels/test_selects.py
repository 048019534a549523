"""Kernels that select: exactly what their references choose, ties and specials of floats included."""

from __future__ import annotations

import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, strided
from torch import Tensor

from tokcompile.kernels import reference_of

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


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("among", [False, True])
@pytest.mark.parametrize(("first", "last", "k"), [(1100, 300, 2000), (3, 9, 2), (0, 0, 1000), (0, 1, 5000)])
def test_keys_that_stay_of_long_rows(padded, among, first, last, k):
    """Rows of several pieces, whose ends, ties and slots are counted from one piece to the next."""
    masks = [mask(4 * n, (1, 5000)) if given else None for n, given in enumerate((padded, among))]
    found = scores(0, (1, 2, 5000), torch.float32)
    found[:, 0] = made(1, 5000)
    same("keep_keys", found, *masks, first, last, k)


def test_rows_that_are_too_long_are_left_to_the_reference():
    from tokcompile.kernels import kernel_fault

    assert "16384" in kernel_fault("topk_mask", (torch.zeros(1, 16385), None, 3))
    assert kernel_fault("topk_mask", (torch.zeros(1, 16384), None, 3)) is None
    assert "priority groups" in kernel_fault("fill_mask", ([torch.zeros(1, 4).bool()] * 5, torch.zeros(1, 4), None, 1))
