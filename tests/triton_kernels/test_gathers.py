"""Kernels of gathers: bit for bit their references."""

from __future__ import annotations

import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, strided
from torch import Tensor

from tokcompile.kernels import _library, reference_of
from tokcompile.kernels.gather_many import reference as gathers

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8])
SIZES = st.integers(1, 5)
SEEDS = st.integers(0, 10)
KINDS = st.integers(0, 2)


def values(seed: int, shape: tuple[int, ...], dtype: torch.dtype, kind: int) -> Tensor:
    value = made(seed, *shape) * 40
    return strided(value > 0 if dtype == torch.bool else value.abs().to(dtype), kind)


def places(seed: int, shape: tuple[int, ...], most: int) -> Tensor:
    found = torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))
    return strided(found, seed % 3)


def same(name: str, *args: object) -> None:
    found = launched(name, *args)
    wanted = reference_of(name)(*args)
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


@st.composite
def token_maps(draw):
    rank = draw(st.integers(2, 5))
    dim, batch = draw(st.permutations(range(rank)))[:2]
    shape = [draw(SIZES) for _ in range(rank)]
    rows, seed = draw(st.sampled_from([1, 3])), draw(SEEDS)
    shape[batch] = draw(st.sampled_from([1, rows]))
    shape[rank - 1] = shape[rank - 1] if rank - 1 == batch else draw(st.sampled_from([1, 7, 33]))
    value = values(seed, tuple(shape), draw(DTYPES), draw(KINDS))
    return (
        value,
        places(seed, (rows, draw(st.sampled_from([0, 1, 6]))), shape[dim]),
        dim - draw(st.sampled_from([0, rank])),
        batch,
    )


@settings(max_examples=50)
@given(token_maps())
def test_tokens(case):
    same("gather_tokens", *case)


@settings(max_examples=40)
@given(
    SIZES, st.sampled_from([(1, 1), (3, 1), (3, 3), (2, 6), (1, 4)]), st.sampled_from([0, 1, 5]), DTYPES, KINDS, SEEDS
)
def test_keys(batch, heads, kept, dtype, kind, seed):
    own, choices = heads
    cache = values(seed, (batch, own, 9, 12), dtype, kind)
    same("gather_keys", cache, places(seed, (batch, choices, kept), 9))


@settings(max_examples=20)
@given(SIZES, SIZES, st.sampled_from([0, 1, 11]), DTYPES, KINDS, SEEDS)
def test_pairs(batch, heads, kept, dtype, kind, seed):
    cache = values(seed, (batch, heads, 7, 12), dtype, kind)
    same("gather_pairs", cache, places(seed, (batch, heads, kept), heads * 7))


@settings(max_examples=40)
@given(
    st.sampled_from([(1, 1), (4, 1), (1, 4), (4, 4), (2, 6), (6, 2)]),
    st.sampled_from([2, 3, 4]),
    st.booleans(),
    st.sampled_from([1, 3]),
    DTYPES,
    KINDS,
    SEEDS,
)
def test_masks(heads, rank, shared, queries, dtype, kind, seed):
    own, choices = heads
    mask = values(seed, (1 if shared else 2, own, queries, 9)[-rank:], dtype, kind)
    if rank < 4 and own > 1 and rank == 3:
        mask = mask[:own]
    same("gather_mask", mask, places(seed, (2, choices, 5), 9))


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 3), DTYPES, KINDS), min_size=1, max_size=4), SEEDS)
def test_many(parts, seed):
    shapes = [((2, 8, 5), (1, 0)), ((1, 1, 8, 4), (2, 0)), ((3, 2, 8), (2, 1)), ((2, 8), (1, 0))]
    given_values = [values(seed, shapes[form][0], dtype, kind) for form, dtype, kind in parts]
    forms = [number for form, _, _ in parts for number in (0, *shapes[form][1])]
    index = places(seed, (2, 6), 8)
    found = launched("gather_many", given_values, index, forms)
    for one, other in zip(found, gathers(given_values, index, forms), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("form", [1, 3])
def test_keys_and_values_of_other_widths_are_one_launch(form):
    key, value = values(0, (2, 3, 9, 8), torch.float16, 1), values(1, (2, 3, 9, 5), torch.float16, 0)
    index = places(2, (2, 3, 4), 9 if form == 1 else 27)
    found = launched("gather_many", [key, value], index, [form, 0, 0] * 2)
    for one, other in zip(found, gathers([key, value], index, [form, 0, 0] * 2), strict=True):
        assert torch.equal(one, other)


def test_tiles_of_long_and_wide_values():
    """More than one tile either way, and a rest in each."""
    same("gather_tokens", values(0, (2, 9, 1500), torch.float32, 0), places(0, (2, 7), 9), 1, 0)
    same("gather_tokens", values(0, (1, 3, 3, 1100), torch.bool, 0), places(1, (2, 1300), 1100), 3, 0)


def test_what_is_out_of_range_reads_no_other_memory():
    value = torch.arange(6.0).reshape(1, 3, 2)
    index = torch.tensor([[-1, 7, -9, 0]])
    assert launched("gather_tokens", value, index, 1, 0)[0].tolist() == [[4, 5], [4, 5], [0, 1], [0, 1]]


def test_more_rows_than_32_bits_count_are_refused():
    value = torch.empty(1 << 16, 1 << 15, 1, dtype=torch.bool, device="meta")
    index = torch.empty(1 << 16, 1 << 15, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="2147483648 rows of a gather; .*TOKRED_KERNELS=off"):
        _library._part("gather_tokens").launch(value, index, 1, 0)
