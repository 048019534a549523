"""flagged_tokens and add_tokens: some tokens of each row taken out, and vectors added to them, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@st.composite
def flagged(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Flags, bool [B, T], another number of them in each row, and how many are taken out: fewer, as many or more."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    return torch.tensor([draw(row) for _ in range(batch)]), draw(st.integers(0, 8))


@settings(max_examples=80)
@given(flagged(), st.booleans())
def test_flagged_tokens_come_in_their_order(made: tuple[torch.Tensor, int], shared: bool) -> None:
    flags, count = made
    batch, tokens = flags.shape
    values = torch.randn(1 if shared else batch, tokens, 2, 3)
    got = ops.flagged_tokens(values, flags, torch.zeros(batch, tokens, 1), count)
    assert got.shape == (batch, count, 2, 3)
    for row, own in enumerate(flags.tolist()):
        places = [place for place, flag in enumerate(own) if flag]
        for number in range(count):
            place = places[min(number, len(places) - 1)] if places else 0
            assert torch.equal(got[row, number], values[0 if shared else row, place])


@each_dtype
@settings(max_examples=80)
@given(made=flagged())
def test_each_flagged_token_gets_its_vector_and_no_other_changes(
    dtype: torch.dtype, made: tuple[torch.Tensor, int]
) -> None:
    flags, count = made
    x = torch.randn(*flags.shape, 3).to(dtype)
    x[:, :1] = -0.0
    more = torch.randn(len(flags), count, 3).to(dtype)
    got = ops.add_tokens(x, flags, more)
    assert got.dtype == dtype
    for row, own in enumerate(flags.tolist()):
        number = 0
        for place, flag in enumerate(own):
            there = flag and number < count
            expected = x[row, place] + more[row, number] if there else x[row, place]
            assert torch.equal(got[row, place], expected)
            assert there or torch.equal(got[row, place].signbit(), x[row, place].signbit())
            number += flag


def test_gradients() -> None:
    flags = torch.tensor([[True, False, True, False], [False, True, False, False]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    more = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.flagged_tokens(x, flags, x, 2), x)
    assert gradcheck(lambda x, more: ops.add_tokens(x, flags, more), (x, more))
    ops.add_tokens(x, flags, more).sum().backward()
    assert more.grad[1].tolist() == [[1.0] * 3, [0.0] * 3]  # the second row has one flagged token


@pytest.mark.parametrize(
    ("x", "flags", "more"),
    [((2, 4), (2, 4), (2, 1, 4)), ((2, 4, 3), (1, 4), (2, 1, 3)), ((2, 4, 3), (2, 4), (2, 3))],
)
def test_what_does_not_fit_is_refused(x: tuple[int, ...], flags: tuple[int, ...], more: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be added"):
        ops.add_tokens(torch.zeros(x), torch.zeros(flags, dtype=torch.bool), torch.zeros(more))
    with pytest.raises(ValueError, match="cannot be added"):
        ops.add_tokens(torch.zeros(2, 4, 3), torch.zeros(2, 4), torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match="choose nothing"):
        ops.flagged_tokens(torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 4, 3), 2)
