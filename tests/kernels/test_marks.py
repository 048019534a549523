"""The operators of marks against loops over tokens."""

from __future__ import annotations

import random

import marking
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tokcompile.editing.capacity import expected_runs, markers
from tokcompile.kernels._empty import EMPTY

ops = torch.ops.tokred
rows = st.lists(st.booleans(), min_size=1, max_size=40)


def bools(row: list[bool]) -> Tensor:
    return torch.tensor([row])


def slots_of(row: list[bool], length: int | None = None) -> list[int]:
    length = len(marking.walk(row)) if length is None else length
    return ops.mark_slots(bools(row), length)[0].tolist()


def test_the_example_of_the_method() -> None:
    """Of twelve tokens, 2 to 9 are of an image, of which 3, 4 and 7 are kept: markers at 2, 6 and 9."""
    row = [2 <= i <= 9 and i not in (3, 4, 7) for i in range(12)]
    assert slots_of(row) == [0, 1, -4, 3, 4, -8, 7, -11, 10, 11]
    source = ops.slot_source(ops.mark_slots(bools(row), 10), bools(row))
    assert source.tolist() == [[0, 1, 2, 3, 4, 6, 7, 9, 10, 11]]


def test_two_thousand_random_masks_give_what_a_loop_gives() -> None:
    """Of one image or two, with text before, between and after, and any number of tokens kept."""
    rng = random.Random(0)
    for case in range(2000):
        images = [rng.randint(1, 12) for _ in range(case % 2 + 1)]
        row, kept = [], 0
        for count in images:
            stays = set(rng.sample(range(count), rng.randint(0, count)))
            kept += len(stays)
            row += [False] * rng.randint(1, 4) + [i not in stays for i in range(count)]
        row += [False] * rng.randint(0, 3)
        walked = marking.walk(row)
        most = marking.capacity(len(row), sum(images), kept, len(images))
        assert len(walked) <= most
        assert slots_of(row, most) == marking.listed(walked, most)


@given(rows, st.integers(1, 6))
def test_long_runs_are_those_of_the_loop(row: list[bool], shortest: int) -> None:
    inside = [False] * len(row)
    for end, start in marking.walk(row, shortest):
        if start is not None:
            inside[start : end + 1] = [True] * (end + 1 - start)
    assert ops.long_runs(bools(row), shortest)[0].tolist() == inside
    assert slots_of(inside) == marking.listed(marking.walk(row, shortest), len(marking.walk(row, shortest)))


def test_a_run_has_a_token() -> None:
    with pytest.raises(ValueError, match="at least one token, not 0"):
        ops.long_runs(bools([True]), 0)


@given(rows, st.integers(0, 5))
def test_means_are_of_the_run_that_a_marker_stands_for(row: list[bool], empty: int) -> None:
    walked = marking.walk(row)
    x = torch.randn(1, len(row), 3, generator=torch.Generator().manual_seed(len(row)), dtype=torch.float64)
    slots = ops.mark_slots(bools(row), len(walked) + empty)
    means = ops.slot_means(x, slots)[0]
    assert (means[:empty] == 0).all()
    for mean, (end, start) in zip(means[empty:], walked, strict=True):
        expected = x[0, end] if start is None else x[0, start : end + 1].mean(0)
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


@given(rows, st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_old_tokens_keep_their_bits_and_new_ones_hold_the_content(
    row: list[bool], empty: int, dtype: torch.dtype
) -> None:
    walked = marking.walk(row)
    x = torch.randn(1, len(row), 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    slots = ops.mark_slots(bools(row), len(walked) + empty)
    vector = torch.arange(4.0)
    for content, held in ((None, torch.zeros(4)), (vector, vector), (vector[None], vector)):
        made = ops.mark_tokens(x, slots, content)[0]
        assert made.dtype == dtype
        assert (made[:empty] == 0).all()
        for got, (end, start) in zip(made[empty:], walked, strict=True):
            assert torch.equal(got, x[0, end] if start is None else held.to(dtype))


@given(rows)
def test_the_mean_of_some_tokens(row: list[bool]) -> None:
    x = torch.randn(1, len(row), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    chosen = [i for i, yes in enumerate(row) if yes]
    expected = x[0, chosen].mean(0) if chosen else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(ops.masked_mean(x, bools(row))[0], expected, rtol=0, atol=1e-12)


@given(rows, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_a_cache_tells_its_empty_slots(row: list[bool], dtype: torch.dtype) -> None:
    """Also where tokens have keys of zeros, as a marker of zeros has in a model without biases."""
    x = torch.randn(1, 2, len(row), 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    x[:, :, ::2] = 0
    cleared = ops.clear_slots(x, bools(row))
    assert ops.held_slots(cleared)[0].tolist() == row
    assert torch.equal(cleared[0, :, row], x[0, :, row])
    assert cleared.isfinite().all()


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16"])
def test_the_value_of_an_empty_slot_is_exact(dtype: str) -> None:
    assert torch.tensor(EMPTY).to(getattr(torch, dtype)).float().item() == EMPTY


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.data())
def test_no_choice_needs_more_slots_and_one_needs_all(
    spans: int, size: int, shortest: int, data: st.DataObject
) -> None:
    """Every choice of some tokens of spans of one size; the number of runs is what kept tokens and ends allow."""
    spans = 1 if size > 5 else min(spans, 2)
    total = spans * size
    kept = data.draw(st.integers(0, total))
    most = markers(kept + spans, total - kept, shortest)
    needed = set()
    for number in range(2**total):
        if number.bit_count() == kept:
            row: list[bool] = []
            for span in range(spans):
                row += [not number >> (span * size + i) & 1 for i in range(size)] + [False]
            needed.add(len(marking.walk(row, shortest)) - kept - spans)
    assert max(needed) <= most
    if shortest <= 2 and spans == 1:
        assert max(needed) == most


def test_slots_of_a_symbolic_number_are_enough() -> None:
    shape = torch.export.Dim("tokens", min=4, max=64)

    class Count(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.new_full((1,), markers(x.shape[0] // 3 + 1, x.shape[0] - x.shape[0] // 3, 3))

    program = torch.export.export(Count(), (torch.zeros(9),), dynamic_shapes={"x": {0: shape}})
    for tokens in (5, 12, 40):
        exact = markers(tokens // 3 + 1, tokens - tokens // 3, 3)
        assert exact <= int(program.module()(torch.zeros(tokens))) <= exact + 1


def test_runs_of_a_random_choice_on_average() -> None:
    """Over every choice of 3 of 7, and of 2 of two spans of 3."""
    for size, spans, kept in ((7, 1, 3), (3, 2, 2)):
        counts = []
        for number in range(2 ** (size * spans)):
            if number.bit_count() == kept:
                row: list[bool] = []
                for span in range(spans):
                    row += [not number >> (span * size + i) & 1 for i in range(size)] + [False]
                counts.append(sum(start is not None for _, start in marking.walk(row)))
        assert sum(counts) / len(counts) == pytest.approx(float(expected_runs(kept, size * spans - kept, spans)))


@given(rows)
def test_markers_can_be_learned(row: list[bool]) -> None:
    x = torch.randn(1, len(row), 2, dtype=torch.float64, requires_grad=True)
    vector = torch.randn(2, dtype=torch.float64, requires_grad=True)
    slots = ops.mark_slots(bools(row), len(marking.walk(row)) + 2)
    assert torch.autograd.gradcheck(lambda a, b: ops.mark_tokens(a, slots, b), (x, vector))
    assert torch.autograd.gradcheck(lambda a: ops.slot_means(a, slots), (x,))
