"""match_pairs and merge_pairs in Triton: against loops, and against the references where those decide ties."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched

from tokcompile.kernels import _triton_tiles, kernel_fault, reference_of

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True, scope="module")
def _restored() -> Iterator[None]:
    """Put back what tests set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_tiles, "LEAST_PART", _triton_tiles.LEAST_PART)
        yield


@settings(max_examples=12)
@given(st.integers(0, 2**31), st.integers(2, 90), st.integers(0, 2), DTYPES, st.sampled_from([16, 256]), st.data())
def test_matches_are_the_references(
    seed: int, tokens: int, leading: int, dtype: torch.dtype, part: int, data: Any
) -> None:
    """Numbers are small integers of vectors of equal lengths, or zero: likeness is exact, and ties are many."""
    torch.manual_seed(seed)
    _triton_tiles.LEAST_PART = part
    batch, depth = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 4, 16, 64]))
    count = data.draw(st.integers(0, max(tokens - leading, 0) // 2))
    metric = torch.randint(0, 2, (batch, tokens, depth)).to(dtype) * 2 - 1
    metric = metric * (torch.rand(batch, tokens, 1) > 0.1)
    if data.draw(st.booleans()):
        metric = metric.mT.contiguous().mT
    got = launched("match_pairs", metric, count, leading)
    assert got.is_contiguous() and torch.equal(got, reference_of("match_pairs")(metric, count, leading))


@settings(max_examples=12)
@given(st.integers(0, 2**31), st.integers(4, 70), DTYPES, st.sampled_from([3, 40, 130]))
def test_partners_are_the_most_alike(seed: int, tokens: int, dtype: torch.dtype, depth: int) -> None:
    """Of arbitrary vectors: no odd token is more alike than the partner, by more than rounding."""
    torch.manual_seed(seed)
    count = tokens // 2
    metric = torch.randn(1, tokens, depth).to(dtype)
    packed = launched("match_pairs", metric, count, 0)[0]
    stays, given_, into = packed[: tokens - count], packed[tokens - count : tokens], packed[tokens:]
    unit = torch.nn.functional.normalize(metric[0].double(), dim=-1)
    alike = unit[::2] @ unit[1::2].T
    of_pair = (unit[given_] * unit[stays[into]]).sum(1)
    assert sorted([*stays.tolist(), *given_.tolist()]) == list(range(tokens))
    torch.testing.assert_close(of_pair, alike.amax(1)[given_ // 2], rtol=0, atol=1e-5)
    assert (of_pair.diff() < 1e-5).all()


@settings(max_examples=16)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(0, 20), DTYPES, st.booleans(), st.booleans(), st.data())
def test_merge(seed: int, slots: int, count: int, dtype: torch.dtype, sized: bool, mean: bool, data: Any) -> None:
    torch.manual_seed(seed)
    batch, width = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 7, 40]))
    tokens = slots + count
    x = torch.randn(batch, width, tokens).to(dtype).mT
    size = torch.rand(batch, tokens).mul(5).ceil() if sized else None
    order = torch.rand(batch, tokens).argsort(1)
    source, given_ = order[:, :slots], order[:, slots:]
    into = torch.randint(slots, (batch, count))
    if data.draw(st.booleans()):
        into = torch.zeros_like(into)
    got = launched("merge_pairs", x, size, source, given_, into, mean)
    weight = torch.ones(batch, tokens, dtype=torch.float64) if size is None else size.double()
    want = torch.zeros(batch, slots, width, dtype=torch.float64)
    for b in range(batch):
        for slot in range(slots):
            of_slot = [int(source[b, slot]), *given_[b, into[b] == slot].tolist()]
            want[b, slot] = (x[b, of_slot].double() * weight[b, of_slot, None]).sum(0)
            want[b, slot] /= weight[b, of_slot].sum() if mean else 1
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got, want.to(dtype), rtol=torch.finfo(dtype).eps * 2, atol=1e-5)


def test_what_is_refused() -> None:
    double = torch.zeros(1, 6, 2, dtype=torch.float64)
    assert "float64" in kernel_fault("match_pairs", (double, 1, 0))
    assert "float64" in kernel_fault("merge_pairs", (double,))
    assert kernel_fault("match_pairs", (double.float(), 1, 0)) is None
    assert kernel_fault("merge_pairs", (double.half(),)) is None
    with pytest.raises(ValueError, match="no 3 pairs among 6 tokens"):
        launched("match_pairs", double.float(), 3, 1)
    with pytest.raises(ValueError, match="x must be"):
        launched("merge_pairs", torch.zeros(2, 2), None, *(torch.zeros(1, 1, dtype=torch.int64),) * 3, True)
