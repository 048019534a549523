"""Attention received from the sums of the model's own attention: when it is so, and when it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fleet
import graphs
import harness
import oncuda
import pytest
import torch
from drawn import made
from drawnattentions import mask_of
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched
from torch import Tensor

from tokcompile.kernels.received_by_sums import reference
from tokcompile.lowering.choosekernels import SETTING, TABLE, choose_kernels
from tokcompile.lowering.sharesums import FLASH, KERNEL, SDPA

# The interpreter's numpy tells of what a GPU does in silence: exp2 of a large number is infinite.
pytestmark = [
    pytest.mark.usefixtures("kernels_unmeasured"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
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


def scores_twice(query: Tensor, key: Tensor, value: Tensor) -> Any:
    out = aten.scaled_dot_product_attention.default(query, key, value)
    return received(query, key), out, ops.attention_received(query, key, None, None, 8**-0.5, False, 0.0, "max", "sum")


def counted(called: list[Any], name: str) -> int:
    return [str(each) for each in called].count(f"tokred_triton.{name}.default")


@pytest.mark.parametrize(("step", "times"), [(scores_first, 1), (scores_last, 1), (scores_twice, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_shared(step: Step, times: int, dtype: torch.dtype) -> None:
    """By flash attention of PyTorch where it can, else by the kernel."""
    called = lowered(step, *(value.to(dtype) for value in VALUES))
    assert called.count(FLASH) == (dtype == torch.bfloat16) and counted(called, KERNEL) == (dtype == torch.float32)
    assert SDPA not in called and counted(called, "received_by_sums") == times
    assert not [each for each in called if "attention_received" in str(each)]


def seen(kind: str) -> Tensor:
    """A mask of 20 x 20, of which a row sees nothing."""
    mask = torch.ones(20, 20, dtype=torch.bool).tril().triu(-6)
    mask[9] = False
    if kind == "bool":
        return mask
    hidden = {"added": -torch.inf, "lowest": torch.finfo(torch.float32).min, "large": -1e9}[kind]
    return torch.zeros(20, 20).masked_fill(~mask, hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["bool", "added", "lowest", "large"])
@pytest.mark.parametrize("shared", [1, 2])
def test_sums_are_shared_under_a_mask(kind: str, shared: int, dtype: torch.dtype) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        own = mask[None, None].expand(2, 1, 20, 20)
        made = received(query, key, mask=own)
        how = {"enable_gqa": True} if shared > 1 else {}
        return made, aten.scaled_dot_product_attention.default(query, key, value, own, **how)

    query, key, value = (each.to(dtype) for each in VALUES)
    mask = seen(kind) if kind == "bool" else seen(kind).clamp(min=torch.finfo(dtype).min).to(dtype)
    called = lowered(step, query, key[:, ::shared], value[:, ::shared], mask)
    assert SDPA not in called and counted(called, KERNEL) == counted(called, "received_by_sums") == 1
    assert not [each for each in called if "attention_received" in str(each)]


def test_symbolic_sizes_stay_open() -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Any:
        out = aten.scaled_dot_product_attention.default(query, key, value, mask)
        return out, received(query, key, mask=mask)

    def inputs(batch: int, tokens: int) -> list[Tensor]:
        mask = torch.ones(batch, 1, tokens, tokens, dtype=torch.bool).tril()
        return [*(made(seed, batch, 4, tokens, 8) for seed in range(3)), mask]

    with torch.no_grad():
        found = graphs.traced(step, *inputs(2, 20), dynamic=[[0, 2], [0, 2], [0, 2], [0, 2, 3]])
        oncuda.put_on_cuda(found.gm)
        choose_kernels(found.gm)
        assert counted([node.target for node in found.gm.graph.nodes], KERNEL) == 1
        for given in (inputs(2, 20), inputs(3, 37)):
            for one, other in zip(found.gm(*given), step(*given), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def other_scale(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key), aten.scaled_dot_product_attention.default(query, key, value, scale=0.5)


def other_keys(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key), aten.scaled_dot_product_attention.default(query, key * 2, value)


def other_queries(query: Tensor, key: Tensor, value: Tensor) -> Any:
    return received(query, key), aten.scaled_dot_product_attention.default(query[:, :, 1:], key, value)


def mask_of_one(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    return received(query, key, mask=mask), aten.scaled_dot_product_attention.default(query, key, value)


def other_mask(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    return received(query, key, mask=mask), aten.scaled_dot_product_attention.default(query, key, value, mask.triu(-3))


def mask_changes_between(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = torch.zeros(20, 20, dtype=query.dtype)
    out = aten.scaled_dot_product_attention.default(query, key, value, mask)
    mask[0].sub_(torch.arange(20, dtype=query.dtype))
    return out, received(query, key, mask=mask)


def later_mask(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """The scores are made of one mask, and attention of another that is made of these."""
    made = received(query, key)
    return made, aten.scaled_dot_product_attention.default(query, key, value, made[:, None, None].to(query.dtype))


def dropped(query: Tensor, key: Tensor, value: Tensor) -> Any:
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    torch.manual_seed(0)
    return received(query, key, mask=mask), aten.scaled_dot_product_attention.default(
        query, key, value, mask, 0.5
    ).sum() * 0


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
    key[0].mul_(2)
    return out, received(query, key)


def one_head_of_keys(query: Tensor, key: Tensor, value: Tensor) -> Any:
    """All heads read it without being asked to share: sizes of 1 are expanded."""
    key = key[:, :1]
    return aten.scaled_dot_product_attention.default(query, key, value[:, :1]), received(query, key)


OTHERS = [other_scale, other_keys, other_queries, mask_of_one, other_mask, mask_changes_between, later_mask, dropped]
OTHERS += [capped, one_is_causal, later_values, keys_change_between, one_head_of_keys]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("step", OTHERS)
def test_other_attention_stays_as_it_is(step: Step, dtype: torch.dtype) -> None:
    called = lowered(step, *(value.to(dtype) for value in VALUES))
    assert SDPA in called and FLASH not in called and not counted(called, KERNEL)
    assert counted(called, "attention_received") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_with_gradients_attention_stays_as_it_is(dtype: torch.dtype) -> None:
    found = graphs.traced(scores_first, *(value.to(dtype) for value in VALUES))
    oncuda.put_on_cuda(found.gm)
    with torch.enable_grad():
        choices = choose_kernels(found.gm)
    assert SDPA in [node.target for node in found.gm.graph.nodes]
    assert [choice.op for choice in choices] == ["attention_received"]


@pytest.mark.parametrize(
    ("rows", "kernel", "reason"),
    [
        ({}, False, "not measured on a GPU in float32: reference by default"),
        ({KERNEL: {"float32": 10}}, True, "the kernel is faster from 10 bytes on; here 20480"),
        ({KERNEL: {"float32": 10**9}}, False, "the kernel is faster from 1000000000 bytes on; here 20480"),
        ({KERNEL: {"float32": None}}, False, "the reference is faster"),
    ],
)
def test_a_table_decides_whether_the_models_attention_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: dict[str, Any], kernel: bool, reason: str
) -> None:
    """By queries, keys, values and the result: four times 2 x 4 x 20 x 8 floats."""
    monkeypatch.setattr("tokcompile.lowering.choosekernels._device_name", lambda device: "a GPU")
    devices = {"a GPU": {"attention_received": {"float32": 1}, **rows}}
    (tmp_path / "table.json").write_text(json.dumps({"unmeasured": "reference", "devices": devices}))
    monkeypatch.setenv(TABLE, str(tmp_path / "table.json"))

    def step(query: Tensor, key: Tensor, value: Tensor) -> Any:
        mask = torch.ones(2, 4, 20, 20, dtype=torch.bool)
        return received(query, key, mask=mask), aten.scaled_dot_product_attention.default(query, key, value, mask)

    with torch.no_grad():
        found = graphs.traced(step, *(value.float() for value in VALUES))
        oncuda.put_on_cuda(found.gm)
        first, choice = choose_kernels(found.gm)
    assert first.op == "attention_received" and first.kernel
    assert (choice.op, choice.node, choice.kernel) == (KERNEL, "scaled_dot_product_attention", kernel)
    assert reason in choice.reason
    called = [node.target for node in found.gm.graph.nodes]
    assert (SDPA in called) != kernel
    assert counted(called, "received_by_sums") == kernel and counted(called, "attention_received") != kernel


RULE = """
rule: everyone
about: Drop the image tokens that all rows of the text attend to least.
steps:
  - score: {name: got, by: attention_received, at: decoder.1.attention, queries: all, heads: mean}
  - select: {name: kept, by: topk, scores: got, among: image, keep: 4, per: row}
  - drop: {at: decoder.2.input, keep: kept}
"""


@pytest.mark.filterwarnings("ignore:rule 'everyone' leaves layers with caches of:UserWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="graphs of a CPU run kernels under Triton's interpreter")
def test_a_padded_batch_shares_its_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that a model makes of its padding is that of its attention, and of what is received of it."""
    path = tmp_path / "everyone.yaml"
    path.write_text(RULE)
    model = fleet.shared("llava")
    inputs = fleet.example(model, 2, (1, 0))
    wanted = harness.prune(model, rule=str(path))(**inputs)
    torch._dynamo.reset()
    monkeypatch.setenv(SETTING, "on")
    with oncuda.lowered_as_on_cuda() as seen:
        found = harness.prune(model, rule=str(path))(**inputs)
    ((gm, choices),) = [each for each in seen if any(choice.op == KERNEL for choice in each[1])]
    assert [choice.reason for choice in choices if choice.op == KERNEL] == ["TOKRED_KERNELS=on"]
    called = [node.target for node in gm.graph.nodes]
    assert counted(called, KERNEL) == counted(called, "received_by_sums") == 1
    (node,) = (node for node in gm.graph.nodes if str(node.target) == f"tokred_triton.{KERNEL}.default")
    assert node.args[3].meta["val"].shape == (2, 1, 24, 24)
    for one, other in zip(*map(oncuda.tensors, (found.to_tuple(), wanted.to_tuple())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    st.integers(0, 1000),
    st.sampled_from([(1, 20), (20, 20), (70, 70)]),
    st.booleans(),
    st.sampled_from(["mean", "max", "sum"]),
    st.sampled_from(["sum", "mean"]),
    st.booleans(),
    st.sampled_from(["none", "bool", "padding", "added", "half", "plane"]),
    st.sampled_from([0.0, 2.0]),
)
def test_received_by_sums(seed, sizes, causal, heads, reduce, every, hidden, softcap):
    torch.manual_seed(seed)
    rows, keys = sizes
    query, key = made(seed, 2, 4, rows, 16), made(seed + 1, 2, 2, keys, 16)
    sums = made(seed + 2, 2, 4, rows).abs() + 3
    sums[0, 1, 0] = (-torch.inf, torch.nan, torch.inf)[seed % 3]
    counted = None if every else made(seed, 2, rows) > 0
    how = (0.25, causal and rows == keys, heads, reduce)
    args = (query, key, sums, counted, *how, mask_of(hidden, 2, 4, rows, keys), softcap)
    torch.testing.assert_close(launched("received_by_sums", *args), reference(*args), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_sums_of_attention_give_what_is_received(causal: bool) -> None:
    query, key = made(0, 2, 4, 70, 16), made(1, 2, 4, 70, 16)
    sums = aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, 0.0, causal)[1]
    found = launched("received_by_sums", query, key, sums, None, 0.25, causal, "mean", "mean")
    wanted = ops.attention_received(query, key, None, None, 0.25, causal, 0.0, "mean", "mean")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_sums_of_other_rows_are_refused() -> None:
    query, sums = made(0, 2, 4, 20, 8), made(0, 2, 4, 20)
    how = (None, 0.5, False, "mean", "mean")
    with pytest.raises(ValueError, match="sums must be"):
        launched("received_by_sums", query, query, sums[:, :, 1:], *how)
    with pytest.raises(ValueError, match="peaks must be"):
        launched("received_by_sums", query, query, sums, *how, None, 0.0, sums.double())
