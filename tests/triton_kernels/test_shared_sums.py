"""Attention received from the sums of the model's own flash attention: when it is so, and when it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import oncuda
import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched
from torch import Tensor

from tokcompile.kernels.received_by_sums import reference
from tokcompile.lowering.choosekernels import choose_kernels
from tokcompile.lowering.sharesums import FLASH, SDPA

pytestmark = pytest.mark.usefixtures("kernels_unmeasured")
aten, ops = torch.ops.aten, torch.ops.tokred
VALUES = tuple(made(seed, 2, 4, 20, 8).to(torch.bfloat16) for seed in range(3))
Step = Callable[..., Any]


def received(query: Tensor, key: Tensor, *, mask: Any = None, causal: bool = False, softcap: float = 0.0) -> Tensor:
    return ops.attention_received(query, key, mask, None, 8**-0.5, causal, softcap, "mean", "mean")


def run_on_cpu(gm: torch.fx.GraphModule) -> None:
    """Put the CPU's flash attention, which hands on the same sums, in place of the GPU's."""
    for node in gm.graph.nodes:
        if node.target is FLASH:
            node.target = aten._scaled_dot_product_flash_attention_for_cpu.default
    gm.recompile()


def lowered(step: Step, *values: Tensor) -> list[Any]:
    """The operators of a step as on a GPU, which must give what the references give."""
    with torch.no_grad():
        found = graphs.traced(step, *values)
        oncuda.put_on_cuda(found.gm)
        choose_kernels(found.gm)
        targets = [node.target for node in found.gm.graph.nodes]
        run_on_cpu(found.gm)
        for one, other in zip(*map(oncuda.tensors, (found.gm(*values), step(*values))), strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-3)
    return targets


def scores_first(query: Tensor, key: Tensor, value: Tensor) -> Any:
    made = received(query, key)
    return made, aten.scaled_dot_product_attention.default(query, key, value)


def scores_last(query: Tensor, key: Tensor, value: Tensor) -> Any:
    out = aten.scaled_dot_product_attention.default(query, key, value, None, 0.0, True)
    return out * 2, received(query, key, causal=True)


@pytest.mark.parametrize("step", [scores_first, scores_last])
def test_sums_are_shared(step: Step) -> None:
    called = lowered(step, *VALUES)
    assert FLASH in called and SDPA not in called
    assert [str(each) for each in called].count("tokred_triton.received_by_sums.default") == 1
    assert not [each for each in called if "attention_received" in str(each)]


def other_scale(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key), aten.scaled_dot_product_attention.default(query, key, value, scale=0.5)


def other_keys(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key), aten.scaled_dot_product_attention.default(query, key * 2, value)


def other_queries(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key), aten.scaled_dot_product_attention.default(query[:, :, 1:], key, value)


def hidden_keys(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    return received(query, key, mask=mask), aten.scaled_dot_product_attention.default(query, key, value, mask)


def capped(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key, softcap=3.0), aten.scaled_dot_product_attention.default(query, key, value)


def one_is_causal(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key, causal=True), aten.scaled_dot_product_attention.default(query, key, value)


def later_values(query: Tensor, key: Tensor, value: Tensor) -> Any:
    made = received(query, key)
    return aten.scaled_dot_product_attention.default(query, key, value * made.sum())


def keys_change_between(query: Tensor, key: Tensor, value: Tensor) -> Any:
    key = key.clone()
    out = aten.scaled_dot_product_attention.default(query, key, value)
    key.mul_(2)
    return out, received(query, key)


@pytest.mark.parametrize(
    "step",
    [other_scale, other_keys, other_queries, hidden_keys, capped, one_is_causal, later_values, keys_change_between],
)
def test_other_attention_stays_as_it_is(step: Step) -> None:
    called = lowered(step, *VALUES)
    assert SDPA in called and FLASH not in called
    assert [str(each) for each in called].count("tokred_triton.attention_received.default") == 1


def test_single_precision_and_gradients_are_left_alone() -> None:
    assert SDPA in lowered(scores_first, *(value.float() for value in VALUES))
    found = graphs.traced(scores_first, *VALUES)
    oncuda.put_on_cuda(found.gm)
    with torch.enable_grad():
        choose_kernels(found.gm)
    assert SDPA in [node.target for node in found.gm.graph.nodes]


@settings(max_examples=25)
@given(
    st.integers(0, 1000),
    st.sampled_from([(1, 20), (20, 20), (70, 70)]),
    st.booleans(),
    st.sampled_from(["mean", "max", "sum"]),
    st.sampled_from(["sum", "mean"]),
    st.booleans(),
)
def test_received_by_sums(seed, sizes, causal, heads, reduce, every):
    rows, keys = sizes
    query, key = made(seed, 2, 4, rows, 16), made(seed + 1, 2, 2, keys, 16)
    sums = made(seed + 2, 2, 4, rows).abs() + 3
    sums[0, 1, 0] = (-torch.inf, torch.nan, torch.inf)[seed % 3]
    counted = None if every else made(seed, 2, rows) > 0
    args = (query, key, sums, counted, 0.25, causal and rows == keys, heads, reduce)
    torch.testing.assert_close(launched("received_by_sums", *args), reference(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_sums_of_attention_give_what_is_received(causal: bool) -> None:
    query, key = made(0, 2, 4, 70, 16), made(1, 2, 4, 70, 16)
    sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, 0.0, causal)[1]
    found = launched("received_by_sums", query, key, sums, None, 0.25, causal, "mean", "mean")
    wanted = ops.attention_received(query, key, None, None, 0.25, causal, 0.0, "mean", "mean")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_sums_of_other_rows_are_refused() -> None:
    query = made(0, 2, 4, 20, 8)
    with pytest.raises(ValueError, match="sums must be"):
        launched("received_by_sums", query, query, made(0, 2, 4, 19), None, 0.5, False, "mean", "mean")
