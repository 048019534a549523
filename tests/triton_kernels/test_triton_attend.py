"""Attention to chosen keys in Triton: against float64 softmax."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import oracles
import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, launched_by_name
from torch import Tensor

from tokcompile.kernels import _triton_tiles, kernel_fault

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True, scope="module")
def _restored() -> Iterator[None]:
    """Put back what `cut` sets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_triton_tiles, "LEAST_PART", _triton_tiles.LEAST_PART)
        yield


@st.composite
def attentions(draw: Any) -> dict[str, Any]:
    """Few queries, many keys, and masks of as many heads as divide those of the queries."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, shared, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.sampled_from([1, 1, 1, 3, 20])), draw(st.integers(1, 60))
    depth, width = draw(st.sampled_from([4, 20])), draw(st.sampled_from([4, 24]))
    dtype = draw(st.sampled_from(list(ROUNDING)))
    heads = shared * group
    key = torch.randn(batch, keys, shared, depth).to(dtype).transpose(1, 2)
    mask, kind = None, draw(st.sampled_from(["none", "bool", "added", "lowest"]))
    if kind != "none":
        shape = (
            draw(st.sampled_from([1, batch])),
            draw(st.sampled_from([1, shared, heads])),
            draw(st.sampled_from([1, queries])),
        )
        mask = torch.rand(*shape, keys) > 0.4
        if kind != "bool":
            mask = torch.where(
                mask, torch.randn(mask.shape), -torch.inf if kind == "added" else torch.finfo(torch.float32).min
            )
    _triton_tiles.LEAST_PART = draw(st.sampled_from([16, 256]))
    return {
        "query": torch.randn(batch, queries, heads, depth).to(dtype).transpose(1, 2) * draw(st.sampled_from([1, 9])),
        "key": key,
        "value": torch.randn(batch, shared, keys, width).to(dtype),
        "mask": mask,
        "scale": 0.3,
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "sinks": draw(st.sampled_from([None, (heads,), (batch, heads)])),
    }


def attended(case: dict[str, Any]) -> Tensor:
    """float64 [B, H, Tq, Dv]."""
    query, mask = case["query"], case["mask"]
    heads = query.shape[1]
    if mask is not None:
        mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    p = oracles.probabilities(query, case["key"], mask, case["scale"], False, case["softcap"], case["sinks"])
    return p @ case["value"].double().repeat_interleave(heads // case["value"].shape[1], 1)


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == dtype and got.is_contiguous()
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=ROUNDING[dtype])


@settings(max_examples=14)
@given(attentions())
def test_attend(case: dict[str, Any]) -> None:
    case["sinks"] = None if case["sinks"] is None else torch.randn(case["sinks"])
    check(launched_by_name("attend", **case), attended(case), case["value"].dtype)


@settings(max_examples=12)
@given(attentions(), st.data())
def test_listed_keys_are_read_where_they_are(case: dict[str, Any], data: Any) -> None:
    """As if keys, values and mask had been gathered before."""
    case["sinks"] = None if case["sinks"] is None else torch.randn(case["sinks"])
    heads, (batch, shared, keys, _) = case["query"].shape[1], case["key"].shape
    choices, count = data.draw(st.sampled_from([1, shared, heads])), data.draw(st.integers(1, keys))
    index = torch.rand(batch, choices, keys).argsort(2)[:, :, :count]
    if data.draw(st.booleans()):
        index = index.transpose(1, 2).contiguous().transpose(1, 2)
    got = launched("attend_chosen", *list(case.values())[:4], index, *list(case.values())[4:])
    planes = max(choices, shared)
    spread = index.expand(batch, planes, count) if choices == 1 else index
    gathered = dict(case)
    for name in ("key", "value"):
        x = case[name].repeat_interleave(planes // shared, 1)
        gathered[name] = x.gather(2, spread[..., None].expand(*spread.shape, x.shape[3]))
    if case["mask"] is not None:
        mask = case["mask"].repeat_interleave(heads // case["mask"].shape[1], 1).expand(batch, heads, -1, -1)
        each = spread.repeat_interleave(heads // planes, 1)
        gathered["mask"] = mask.gather(3, each[:, :, None].expand(-1, -1, mask.shape[2], -1))
    check(got, attended(gathered), case["value"].dtype)


def test_rows_that_see_nothing_are_zero() -> None:
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 1, 5, 4)
    hidden = torch.zeros(1, 1, 1, 5, dtype=torch.bool)
    assert torch.equal(launched("attend", query, key, key, hidden, 1.0, 0.0), torch.zeros(1, 2, 3, 4))


def test_many_queries_are_several_tiles() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 50, 4), torch.randn(1, 1, 20, 4)
    case = {"query": query, "key": key, "value": key, "mask": None, "scale": 0.5, "softcap": 0.0, "sinks": None}
    check(launched_by_name("attend", **case), attended(case), torch.float32)


def test_rows_of_the_widest_floats_are_several_tiles() -> None:
    """Where rows of half precision are one: a GPU has no room for them."""
    assert [_triton_tiles.most_rows(depth, exact) for depth, exact in ((256, True), (128, True), (256, False))] == [
        16,
        64,
        64,
    ]
    case = {"query": made(0, 1, 2, 20, 256), "key": made(1, 1, 2, 40, 256), "value": made(2, 1, 2, 40, 8)}
    case |= {"mask": None, "scale": 0.06, "softcap": 0.0, "sinks": None}
    check(launched_by_name("attend", **case), attended(case), torch.float32)
    case |= {"value": made(2, 1, 2, 40, 256), "query": made(0, 1, 2, 20, 8), "key": made(1, 1, 2, 40, 8)}
    check(launched_by_name("attend", **case), attended(case), torch.float32)


def test_what_is_refused() -> None:
    query = torch.zeros(1, 4, 1, 8)
    assert kernel_fault("attend", (query, query, query)) is None
    assert "of one dtype" in kernel_fault("attend", (query, query, query.half()))
    with pytest.raises(ValueError, match="do not divide"):
        launched("attend", query, query[:, :3], query[:, :3], None, 1.0, 0.0)
