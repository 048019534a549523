"""inserted_source, original_places, insert_tokens, and attention under a mask shorter than the keys: against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


@st.composite
def sequences(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Places of inserted tokens, as many in each row, bool [B, T'], and how many old tokens there are."""
    batch, old, count = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(0, 4))
    rows = []
    for _ in range(batch):
        places = draw(st.lists(st.integers(0, old + count - 1), min_size=count, max_size=count, unique=True))
        rows.append([place in places for place in range(old + count)])
    return torch.tensor(rows), old


@settings(max_examples=80)
@given(sequences(), st.integers(0, 6))
def test_each_token_of_the_longer_sequence_has_an_old_one(made: tuple[torch.Tensor, int], first: int) -> None:
    fresh, old = made
    firsts = torch.full((len(fresh),), min(first, old - 1))
    for given_first in (None, firsts):
        got = ops.inserted_source(fresh, torch.zeros(len(fresh), old), given_first)
        for row, flags in enumerate(fresh.tolist()):
            last, expected = -1, []
            for new in flags:
                last += not new
                least = 0 if given_first is None else int(firsts[row])
                expected.append(max(last, least) if new else last)
            assert got[row].tolist() == expected


@settings(max_examples=80)
@given(sequences(), st.integers(1, 3))
def test_old_tokens_come_back_and_new_ones_stand_in_turn(made: tuple[torch.Tensor, int], held: int) -> None:
    fresh, old = made
    x, tokens = torch.randn(len(fresh), old, 3), torch.randn(1, held, 3)
    source = ops.inserted_source(fresh, x[..., 0], None)
    longer = ops.insert_tokens(x, source, fresh, tokens)
    for row, flags in enumerate(fresh.tolist()):
        olds, news = iter(x[row]), 0
        for place, new in enumerate(flags):
            assert torch.equal(longer[row, place], tokens[0, min(news, held - 1)] if new else next(olds))
            news += new
    places = ops.original_places(fresh, x[..., 0])
    assert torch.equal(ops.gather_tokens(longer, places, 1, 0), x)


def test_inserting_has_the_gradients_of_a_concatenation() -> None:
    x = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    fresh = torch.tensor([[True, False, True, False, False], [False, False, True, True, False]])
    source = ops.inserted_source(fresh, x[..., 0], None)
    assert torch.autograd.gradcheck(lambda value, new: ops.insert_tokens(value, source, fresh, new), (x, tokens))


def test_shapes_that_do_not_fit_are_refused() -> None:
    flags, x = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 4, 2)
    for op in (lambda f, v: ops.inserted_source(f, v, None), ops.original_places):
        for fresh, like in ((flags.int(), x[..., 0]), (flags[0], x[..., 0]), (flags, x)):
            with pytest.raises(ValueError, match="fresh must be"):
                op(fresh, like)
    source = torch.zeros(1, 4, dtype=torch.int64)
    for tokens in (torch.zeros(1, 1, 3), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match="cannot be put into"):
            ops.insert_tokens(x, source, flags, tokens)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_past_the_end_of_a_mask_are_real(causal: bool) -> None:
    query, key, value = torch.randn(2, 2, 2, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 4)
    short = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    whole = torch.cat([short, torch.ones(2, 3, dtype=torch.int64)], 1)
    args = (0.5, causal)
    got = ops.attention(query, key, value, short, *args)
    assert torch.equal(got, ops.attention(query, key, value, whole, *args))
    assert not torch.equal(got, ops.attention(query, key, value, torch.ones_like(whole), *args))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 8),
    lead=st.integers(0, 4),
    more=st.integers(0, 6),
    padding=st.sampled_from(["none", "left", "anywhere"]),
)
def test_end_places(seed: int, tokens: int, lead: int, more: int, padding: str) -> None:
    rng = torch.Generator().manual_seed(seed)
    real = torch.rand(2, tokens, generator=rng) > 0.4
    if padding == "left":
        real = torch.arange(tokens) >= torch.tensor([[0], [seed % tokens]])
    real[:, seed % tokens] = True
    got = ops.end_places(torch.zeros(2, tokens), None if padding == "none" else real, lead, lead + more)
    for row in range(2):
        places = [j for j in range(tokens) if padding == "none" or real[row, j]]
        front = [places[min(i, len(places) - 1)] for i in range(lead)]
        behind = [places[max(len(places) - more + i, 0)] for i in range(more)]
        assert got[row].tolist() == front + behind
