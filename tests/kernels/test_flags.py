"""flagged_tokens and its like: some tokens of each row found, taken out, and added to, against loops."""

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


@settings(max_examples=80)
@given(flagged())
def test_listed_tokens_tell_tokens_from_repetitions(made: tuple[torch.Tensor, int]) -> None:
    flags, count = made
    got = ops.listed_tokens(torch.zeros(*flags.shape, 1), flags, count)
    assert got.tolist() == [[number < sum(own) for number in range(count)] for own in flags.tolist()]


@each_dtype
@settings(max_examples=60)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=3))
def test_a_token_matches_a_vector_in_every_number(dtype: torch.dtype, rows: list[list[int]]) -> None:
    kinds = torch.tensor([[1.5, -2.0, 0.1], [1.5, -2.0, 0.1], [1.5, -2.0, 0.7], [float("nan"), 0.0, 0.0]]).to(dtype)
    kinds[1, 2] = torch.nextafter(kinds[1, 2], torch.tensor(1.0, dtype=dtype)) if dtype == torch.float32 else 0.125
    got = ops.matching_tokens(kinds[torch.tensor(rows)], kinds[[0, 2, 3]])
    assert got.tolist() == [[kind in (0, 2) for kind in row] for row in rows]


@each_dtype
@settings(max_examples=60)
@given(st.integers(1, 2), st.integers(0, 4), st.integers(1, 4), st.data())
def test_attend_after_sees_what_may_be_seen(
    dtype: torch.dtype, batch: int, past: int, new: int, data: st.DataObject
) -> None:
    """Also where nothing of the past may be: then the first new token sees itself alone."""
    row = st.lists(st.booleans(), min_size=past, max_size=past)
    seen = torch.tensor([data.draw(row) for _ in range(batch)], dtype=torch.bool).reshape(batch, past)
    q, k, v = (torch.randn(batch, 2, n, 3).to(dtype) for n in (new, past + new, past + new))
    got = ops.attend_after(q, k, v, seen)
    assert got.dtype == dtype
    for b in range(batch):
        for h in range(2):
            for i in range(new):
                own = [j for j in range(past) if seen[b, j]] + list(range(past, past + i + 1))
                shares = torch.stack([q[b, h, i].double() @ k[b, h, j].double() / 3**0.5 for j in own]).softmax(0)
                expected = shares @ v[b, h, own].double()
                assert torch.allclose(got[b, h, i].double(), expected, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_gradients() -> None:
    flags = torch.tensor([[True, False, True, False], [False, True, False, False]])
    x = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    more = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.flagged_tokens(x, flags, x, 2), x)
    assert gradcheck(lambda x, more: ops.add_tokens(x, flags, more), (x, more))
    past = torch.tensor([[True, False], [False, False]])
    q, k, v = (torch.randn(2, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 4, 4))
    assert gradcheck(lambda q, k, v: ops.attend_after(q, k, v, past), (q, k, v))
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
    with pytest.raises(ValueError, match="no flags"):
        ops.listed_tokens(torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.bool), 2)
    with pytest.raises(ValueError, match="no vectors"):
        ops.matching_tokens(torch.zeros(2, 5, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must be three"):
        ops.attend_after(*(torch.zeros(1, 1, 2, 3) for _ in range(3)), torch.zeros(1, 0))
