"""Received attention in Triton: against float64 softmax with all heads at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
from drawnattentions import attentions
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, launched_by_name
from torch import Tensor

from tokcompile.kernels import _triton_columns, _triton_tiles, kernel_fault, kernel_op

HEADS = st.sampled_from(["mean", "max", "sum"])


# The interpreter's numpy tells of what a GPU does in silence: exp2 of a large number is infinite.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")


@pytest.fixture(autouse=True, scope="module")
def _restored() -> Iterator[None]:
    """Put back what `prepared` sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_columns, "FEW_ROWS", _triton_columns.FEW_ROWS)
        patch.setattr(_triton_columns, "_is_worth_keeping", _triton_columns._is_worth_keeping)
        patch.setattr(_triton_tiles, "LEAST_PART", _triton_tiles.LEAST_PART)
        yield


def prepared(case: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The arguments that all operators share, and float64 probabilities. Sets how work is cut."""
    case = dict(case)
    _triton_columns.FEW_ROWS = 64 if case.pop("few") else 0
    _triton_tiles.LEAST_PART, kept = case.pop("part"), case.pop("kept")
    _triton_columns._is_worth_keeping = lambda site: kept
    case["sinks"] = None if case["sinks"] is None else torch.randn(case["sinks"])
    names = ("query", "key", "mask", "is_causal", "softcap", "sinks")
    query, key, mask, is_causal, softcap, sinks = (case[name] for name in names)
    return case, oracles.probabilities(query, key, mask, 0.3, is_causal, softcap, sinks)


def check(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32 and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)


@settings(max_examples=12)
@given(attentions(), HEADS, st.sampled_from(["sum", "mean"]), st.sampled_from(["all", "some", "none", "last"]))
def test_received(case: dict[str, Any], heads: str, reduce: str, which: str) -> None:
    arguments, p = prepared(case)
    batch, _, queries, _ = arguments["query"].shape
    rows = None if which == "all" else torch.rand(batch, queries) > (0.5 if which == "some" else 2.0)
    if which == "last":
        rows[:, -1] = True
    got = launched_by_name("attention_received", **arguments, rows=rows, scale=0.3, heads=heads, reduce=reduce)
    check(got, oracles.received(p, rows, heads, reduce))


@settings(max_examples=8)
@given(attentions(), HEADS)
def test_row(case: dict[str, Any], heads: str) -> None:
    arguments, p = prepared(case)
    batch, _, queries, _ = arguments["query"].shape
    index = torch.randint(queries, (batch,))
    got = launched_by_name("attention_row", **arguments, index=index, scale=0.3, heads=heads)
    check(got, oracles.over_heads(torch.stack([p[b, :, i] for b, i in enumerate(index.tolist())]), heads))


def last_rows(valid: Tensor | None, batch: int, queries: int, window: int) -> Tensor:
    """bool [B, Tq]: the last real queries, all of them for a window of 0."""
    real = torch.ones(batch, queries, dtype=torch.bool) if valid is None else valid
    return real & ((real.flip(1).cumsum(1).flip(1) <= window) | (window == 0))


@settings(max_examples=12)
@given(attentions(), HEADS, st.sampled_from(["sum", "mean", "seen"]), st.sampled_from([0, 1, 5, 40]), st.data())
def test_key_attention_and_viewers(case: dict[str, Any], heads: str, reduce: str, window: int, data: Any) -> None:
    arguments, p = prepared(case)
    query, key, mask = (arguments[name] for name in ("query", "key", "mask"))
    (batch, count, queries, _), keys = query.shape, key.shape[2]
    if mask is not None and mask.dim() == 4 and mask.shape[1] > 1:
        # All heads are to hide the same.
        mask = arguments["mask"] = mask[:, :1]
        p = oracles.probabilities(query, key, mask, 0.3, *(arguments[n] for n in ("is_causal", "softcap", "sinks")))
    valid = (torch.rand(batch, queries) > 0.4) if data.draw(st.booleans()) else None
    cached = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    counted = last_rows(valid, batch, queries, window)
    seen = torch.ones(batch, queries, keys, dtype=torch.bool)
    if mask is not None:
        plane = mask[:, 0] if mask.dim() == 4 else mask
        seen &= plane if plane.dtype == torch.bool else plane > torch.finfo(torch.float32).min / 2
    if arguments["is_causal"]:
        seen &= torch.ones(queries, keys, dtype=torch.bool).tril()
    viewers = (seen & counted[:, :, None]).sum(1).double()
    got = launched("key_viewers", query, key, mask, valid, window, arguments["is_causal"])
    check(got, viewers)
    want = (p * counted[:, None, :, None]).sum(2)
    if reduce != "sum":
        divisor = viewers if reduce == "seen" else counted.sum(1, keepdim=True).double()
        want = want / divisor.clamp(min=1)[:, None]
    groups = want.unflatten(1, (cached, -1))
    want = torch.stack([oracles.over_heads(groups[:, g], heads) for g in range(cached)], 1)
    got = launched_by_name(
        "key_attention",
        **arguments,
        valid=valid,
        window=window,
        cache_heads=cached,
        scale=0.3,
        heads=heads,
        reduce=reduce,
    )
    check(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [32, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_head_sizes(depth: int, dtype: torch.dtype) -> None:
    torch.manual_seed(depth)
    query, key = torch.randn(1, 4, 150, depth).to(dtype), torch.randn(1, 2, 150, depth).to(dtype)
    got = launched("attention_received", query, key, None, None, depth**-0.5, True, 0.0, "mean", "mean")
    p = oracles.probabilities(query, key, None, depth**-0.5, True, 0.0)
    check(got, oracles.received(p, None, "mean", "mean"))


def test_the_same_bits_twice() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    arguments = (query, key, None, None, 0.3, True, 0.0, "mean", "mean")
    assert torch.equal(launched("attention_received", *arguments), launched("attention_received", *arguments))


def test_no_value_of_rows_by_keys_is_made(allocated: list[int]) -> None:
    """All that is allocated is linear in the tokens."""
    query = torch.randn(1, 1, 150, 4)
    kernel_op("attention_received")(query, query, None, None, 0.3, False, 0.0, "mean", "mean", None)
    assert allocated and max(allocated) <= 150 * _triton_tiles.MOST_PARTS < 150 * 150


@pytest.mark.parametrize("name", ["attention_received", "attention_row", "key_attention"])
def test_what_is_not_supported(name: str) -> None:
    query, wide = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 512)
    assert kernel_fault(name, (query, query, None)) is None
    assert kernel_fault(name, (query, query.half(), None)) is None
    assert "of one dtype" in kernel_fault(name, (query.half(), query, None))
    assert "float64" in kernel_fault(name, (query.double(), query.double(), None))
    assert "512" in kernel_fault(name, (wide, wide, None))


def test_bad_arguments_are_refused_as_by_the_references() -> None:
    query, key, rows = torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8), torch.ones(1, 2)
    index = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="4 query heads do not divide among 3"):
        launched("attention_received", query, key, None, None, 1.0, False, 0.0, "mean", "sum")
    with pytest.raises(ValueError, match="rows must be bool"):
        launched("attention_received", query, query, None, rows, 1.0, False, 0.0, "mean", "sum")
    with pytest.raises(ValueError, match="heads must be one of"):
        launched("attention_row", query, query, None, index, 1.0, False, 0.0, "median")
    with pytest.raises(ValueError, match="cached heads"):
        launched("key_attention", query, query, None, None, 0, 3, 1.0, False, 0.0, "mean", "sum")
    with pytest.raises(ValueError, match="valid must be bool"):
        launched("key_viewers", query, query, None, rows, 0, False)
