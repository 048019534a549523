"""What scores the keys of a route in Triton: key_votes and pair_scores, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import oracles
import pytest
import torch
from drawn import padded
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched
from torch import Tensor

from tokcompile.kernels import _triton_tiles, kernel_fault, triton_pair_scores

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, scope="module")
def _restored() -> Iterator[None]:
    """Put back what tests set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_tiles, "LEAST_PART", _triton_tiles.LEAST_PART)
        yield


@st.composite
def steps(draw: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """A query of each head, float32 or of the keys' dtype, the keys, and which are real."""
    seed = draw(st.integers(0, 2**31))
    torch.manual_seed(seed)
    batch, shared, group, tokens = (draw(st.integers(1, n)) for n in (2, 2, 3, 60))
    dtype, depth = draw(DTYPES), 12
    key = torch.randn(batch, tokens, shared, depth).to(dtype).transpose(1, 2)
    query = torch.randn(batch, shared * group, depth).to(draw(st.sampled_from([dtype, torch.float32])))
    _triton_tiles.LEAST_PART = draw(st.sampled_from([16, 256]))
    return query, key, padded(seed, batch, tokens) if draw(st.booleans()) else None


@settings(max_examples=12)
@given(steps(), st.integers(0, 3), st.integers(0, 3))
def test_votes(case: tuple[Tensor, Tensor, Tensor | None], first: int, last: int) -> None:
    query, key, valid = case
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool) if valid is None else valid
    rank = real.cumsum(1)
    up = real & (rank > first) & (rank <= rank[:, -1:] - last)
    p = oracles.probabilities(query[:, :, None], key, up[:, None, None], 1.0, False, 0.0)
    got = launched("key_votes", query, key, valid, first, last)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), p.sum((1, 2))[:, None], rtol=1e-4, atol=2e-5)


def scores_of(query: Tensor, key: Tensor, chosen: Tensor, start: int, pairs: int, neighbours: bool) -> Tensor:
    """float64 [B, H, N]: products over chosen pairs and over numbers that are in none."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    out = torch.zeros(query.shape[0], heads, key.shape[2], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(heads):
            own = chosen[b, h * chosen.shape[1] // heads].tolist()
            ends = [(2 * i, 2 * i + 1) if neighbours else (i, i + pairs) for i in own]
            numbers = [start + n for end in ends for n in end]
            numbers += [n for n in range(key.shape[3]) if not start <= n < start + 2 * pairs]
            out[b, h] = key[b, h // groups].double()[:, numbers] @ query[b, h].double()[numbers]
    return out


@settings(max_examples=16)
@given(steps(), st.integers(0, 2), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans(), st.data())
def test_pair_scores(
    case: tuple[Tensor, Tensor, Tensor | None],
    start: int,
    pairs: int,
    neighbours: bool,
    each_own: bool,
    by_row: bool,
    data: Any,
) -> None:
    query, key, valid = case
    batch, (heads, shared, tokens) = key.shape[0], (query.shape[1], *key.shape[1:3])
    choices, count = heads if each_own else shared, data.draw(st.integers(0, pairs))
    chosen = torch.rand(batch if by_row else 1, choices, pairs).argsort(2)[:, :, :count]
    want = scores_of(query, key, chosen.expand(batch, -1, -1), start, pairs, neighbours)
    if choices == shared and heads > shared:
        real = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid
        grouped = want.unflatten(1, (shared, -1))
        want = torch.zeros(batch, shared, tokens, dtype=torch.float64)
        for b in range(batch):
            of_real = grouped[b][..., real[b]]
            off = grouped[b] - of_real.mean(-1, keepdim=True)
            spread = of_real.std(-1, correction=0, keepdim=True)
            # Where all keys are as good as equal, rounding alone would be brought to variance 1.
            if (spread < 1e-3).any():
                return
            want[b] = (off / spread).sum(1)
    given_chosen = chosen if by_row else chosen[0]
    # Of sectors of 0 bytes chosen numbers touch few, and are read alone; of 32, most.
    with mock.patch.object(triton_pair_scores, "SECTOR", data.draw(st.sampled_from([0, 32]))):
        got = launched("pair_scores", query, key, given_chosen, valid, start, pairs, neighbours)
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sector", [0, 32])
def test_numbers_that_are_not_chosen_may_be_anything(sector: int) -> None:
    query, key = torch.ones(1, 1, 8), torch.full((1, 1, 3, 8), torch.nan)
    query[..., 0], query[..., 5], key[..., [1, 5]] = torch.inf, 3.0, 2.0
    with mock.patch.object(triton_pair_scores, "SECTOR", sector):
        got = launched("pair_scores", query, key, torch.ones(1, 1, dtype=torch.int64), None, 0, 4, False)
    assert torch.equal(got, torch.full((1, 1, 3), 8.0))


def test_equal_scores_are_zero() -> None:
    query, key = torch.ones(1, 2, 4), torch.ones(1, 1, 7, 4)
    got = launched("pair_scores", query, key, torch.zeros(1, 1, dtype=torch.int64), None, 0, 2, False)
    assert torch.equal(got, torch.zeros(1, 1, 7))


def test_what_is_refused() -> None:
    query, key = torch.zeros(1, 4, 8), torch.zeros(1, 3, 5, 8)
    assert kernel_fault("key_votes", (query, key.half())) is None
    assert "float64" in kernel_fault("pair_scores", (query.double(), key))
    with pytest.raises(ValueError, match="query and key must be"):
        launched("key_votes", query, key, None, 0, 0)
    with pytest.raises(ValueError, match="query, key and chosen must be"):
        launched("pair_scores", query, key, torch.zeros(3, 1), None, 0, 1, False)
