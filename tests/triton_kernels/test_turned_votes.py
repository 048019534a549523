"""Votes for keys that are turned in registers: the kernel, and when a graph runs it."""

from __future__ import annotations

from typing import Any

import oncuda
import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, strided
from torch import Tensor

from tokcompile.kernels import kernel_fault
from tokcompile.kernels._library import kernel_reference

pytestmark = pytest.mark.usefixtures("kernels_unmeasured")
ops = torch.ops.tokred
SIZES = st.sampled_from([(1, 1, 8, 4, 0), (2, 3, 20, 8, 0), (1, 4, 70, 12, 4), (3, 2, 33, 10, 2)])
"""Heads of keys, query heads for each, tokens, numbers of a head, and of these that are not turned."""


def case(
    size: tuple[int, ...], seed: int, dtype: torch.dtype, neighbours: bool, padded: bool, several: bool = False
) -> list[Any]:
    heads, group, tokens, width, rest = size
    draw = torch.Generator().manual_seed(seed)
    here = torch.randint(0, 3000, (2, tokens), generator=draw)
    there = here.flip(1) if seed % 2 else torch.zeros(1, tokens)
    valid = torch.rand(2, tokens, generator=draw) < 0.7 if padded else None
    query = made(seed, 2, heads * group, width)
    key = strided(made(seed + 1, 2, heads, tokens, width).to(dtype), seed % 3)
    pairs = (width - rest) // 2
    frequencies = made(seed + 2, 2, pairs).abs() if seed % 3 else made(seed + 2, pairs).abs()
    coordinate = torch.randint(0, 3, (pairs,), generator=draw).tolist() if several else None
    if several:
        here = torch.randint(0, 3000, (2, 1, tokens, 3), generator=draw)
    return [query, key, here, there, frequencies, rest // 2, neighbours, coordinate, valid, seed % 4, seed % 5]


@settings(max_examples=25)
@given(SIZES, st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]), *[st.booleans()] * 3)
def test_votes_are_those_for_keys_that_were_turned(size, seed, dtype, neighbours, padded, several):
    args = case(size, seed, dtype, neighbours, padded, several)
    found, wanted = launched("turned_votes", *args), kernel_reference("turned_votes")(*args)
    # A key that rounds otherwise is off by one in its last place; the interpreter cuts where a GPU rounds.
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found, wanted, **near)


def test_heads_with_positions_of_their_own_are_left_apart():
    args = case((2, 1, 8, 4, 0), 0, torch.float32, False, False)
    assert kernel_fault("turned_votes", args) is None
    args[2] = args[2][:, None].expand(2, 2, 8)
    assert "positions of their own" in kernel_fault("turned_votes", args)


QUERY, KEY, HERE = made(0, 2, 4, 8), made(1, 2, 2, 9, 8), torch.arange(9).expand(2, 9).contiguous()
FREQUENCIES = made(2, 4).abs()
VALUES = (QUERY, KEY, HERE, FREQUENCIES)


def alone(query: Tensor, key: Tensor, here: Tensor, frequencies: Tensor) -> Tensor:
    turned = ops.turn_pairs(key, here, torch.zeros_like(here), frequencies, 0, False)
    return ops.key_votes(query, turned, None, 1, 2)


def read_again(query: Tensor, key: Tensor, here: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    turned = ops.turn_pairs(key, here, torch.zeros_like(here), frequencies, 0, False)
    return ops.key_votes(query, turned, None, 1, 2), turned.sum()


def changed(query: Tensor, key: Tensor, here: Tensor, frequencies: Tensor) -> Tensor:
    turned = ops.turn_pairs(key, here, torch.zeros_like(here), frequencies, 0, False)
    torch.ops.aten.add_.Tensor(key, 1)
    return ops.key_votes(query, turned, None, 1, 2)


def own_positions(query: Tensor, key: Tensor, here: Tensor, frequencies: Tensor) -> Tensor:
    each = torch.stack([here, here.flip(1)], 1)
    turned = ops.turn_pairs(key, each, torch.zeros_like(each), frequencies, 0, False)
    return ops.key_votes(query, turned, None, 1, 2)


def of_coordinates(query: Tensor, key: Tensor, here: Tensor, frequencies: Tensor) -> Tensor:
    each = torch.stack([here, here.flip(1)], -1)[:, None]
    turned = ops.turn_pairs(key, each, torch.zeros_like(here), frequencies, 0, False, [0, 1, 1, 0])
    return ops.key_votes(query, turned, None, 1, 2)


@pytest.mark.parametrize("step", [alone, of_coordinates])
def test_keys_are_turned_where_they_are_read(step: Any) -> None:
    called = oncuda.lowered(step, VALUES)
    assert called.count("tokred_triton::turned_votes") == 1
    assert not [name for name in called if "turn_pairs" in name or "key_votes" in name]


@pytest.mark.parametrize("step", [read_again, changed, own_positions])
def test_a_turned_copy_is_made_where_it_is_needed(step: Any) -> None:
    called = oncuda.lowered(step, VALUES)
    assert "tokred_triton::turned_votes" not in called
    assert "tokred_triton::turn_pairs" in called and "tokred_triton::key_votes" in called
