"""Which kernels graphs run on a GPU, and that they give what the references give."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import graphs
import harness
import oncuda
import pytest
import ruleexamples
import torch
from drawn import made
from rulecases import RULES
from torch import Tensor

from tokcompile import kernels
from tokcompile.errors import LowerError
from tokcompile.kernels import _triton
from tokcompile.lowering.choosekernels import SETTING, TABLE, Choice, choices_of, choose_kernels, measured, tag
from tokcompile.lowering.lower import lower

pytestmark = [
    pytest.mark.usefixtures("kernels_unmeasured"),
    pytest.mark.skipif(
        not _triton.interpreted(),
        reason="graphs of a CPU run kernels under Triton's interpreter, which GPUs do without",
    ),
]
ops = torch.ops.tokred


def prune(x: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
    """Two gathers by one index, and one of another's result."""
    source = ops.kept_indices(keep, 4)
    rows = ops.gather_tokens(mask, source, 1, 0)
    return ops.gather_tokens(x, source, 1, 0), ops.gather_tokens(rows, source, 2, 0), ops.last_valid(keep)


def program(*dynamic: list[int]) -> Any:
    values = made(0, 2, 9, 4), made(1, 2, 9, 9), made(2, 2, 9) > 0
    found = graphs.traced(prune, *values, dynamic=dynamic)
    oncuda.put_on_cuda(found.gm)
    return found, values


def targets(gm: torch.fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def test_kernels_are_chosen_on_cuda_and_gathers_by_one_index_are_one_launch() -> None:
    found, values = program()
    wanted = prune(*values)
    choices = choose_kernels(found.gm)
    assert [(choice.op, choice.kernel) for choice in choices] == [
        ("kept_indices", True),
        ("gather_tokens", True),
        ("gather_tokens", True),
        ("gather_tokens", True),
        ("last_valid", False),
    ]
    assert choices[-1].reason == "the operator has no kernel"
    called = targets(found.gm)
    assert called.count("tokred_triton.gather_many.default") == 1
    assert called.count("tokred_triton.gather_tokens.default") == 1  # columns, of rows that were gathered before
    assert not [each for each in called if each == "tokred.gather_tokens.default"]
    for one, other in zip(found.gm(*values), wanted, strict=True):
        assert torch.equal(one, other)


def test_as_shipped_nothing_is_chosen_that_was_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TABLE)
    assert measured().devices == {}
    found, _ = program()
    choices = choose_kernels(found.gm)
    assert choices and not any(choice.kernel for choice in choices)
    assert choices[0].reason.endswith("reference by default")
    monkeypatch.setenv(SETTING, "on")
    assert any(choice.kernel for choice in choose_kernels(found.gm))


def test_symbolic_sizes_stay_open() -> None:
    found, values = program([0, 1], [0, 1, 2], [0, 1])
    choose_kernels(found.gm)
    assert targets(found.gm).count("tokred_triton.gather_many.default") == 1
    longer = made(0, 3, 12, 4), made(1, 3, 12, 12), made(2, 3, 12) > 0
    for inputs in (values, longer):
        for one, other in zip(found.gm(*inputs), prune(*inputs), strict=True):
            assert torch.equal(one, other)


def test_a_value_that_is_changed_in_place_in_between_is_read_where_it_was() -> None:
    def change(x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, ...]:
        one = ops.gather_tokens(x, index, 1, 0)
        torch.ops.aten.add_.Tensor(y, 1)
        return one, ops.gather_tokens(y, index, 1, 0)

    values = made(0, 1, 5, 3), made(1, 1, 5, 3), torch.tensor([[3, 1]])
    found = graphs.traced(change, *values)
    oncuda.put_on_cuda(found.gm)
    choose_kernels(found.gm)
    assert "tokred_triton.gather_many.default" not in targets(found.gm)


def test_off_and_a_cpu_leave_references(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = program()
    before = targets(found.gm)
    monkeypatch.setenv(SETTING, "off")
    assert {choice.reason for choice in choose_kernels(found.gm)} == {"TOKRED_KERNELS=off"}
    assert targets(found.gm) == before
    monkeypatch.setenv(SETTING, "auto")
    plain = graphs.traced(prune, *program()[1]).gm
    reasons = {choice.op: choice.reason for choice in choose_kernels(plain)}
    assert reasons["gather_tokens"] == "its tensors are on cpu; kernels run on cuda"
    assert targets(plain) == before


def test_what_a_kernel_cannot_run_says_why() -> None:
    scores = torch.zeros(1, 20000)
    found = graphs.traced(lambda s: ops.window_topk_mask(s, 100, 200, 1, 1, 3), scores)
    oncuda.put_on_cuda(found.gm)
    assert choices_of(found.gm) == [
        Choice("window_topk_mask", "window_topk_mask", False, "windows of 20000 tokens; the kernel holds 16384")
    ]


def test_another_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "fast")
    with pytest.raises(LowerError, match="TOKRED_KERNELS is none of its settings") as caught:
        choose_kernels(program()[0].gm)
    assert caught.value.found == "TOKRED_KERNELS=fast" and "auto, off, on" in caught.value.remedy


@pytest.mark.parametrize(
    ("row", "kernel", "reason"),
    [
        (82, True, "the kernel is faster from 82 bytes on"),
        (10**9, False, "the kernel is faster from 1000000000 bytes on"),
        (None, False, "the reference is faster"),
        ("no row", False, "not measured on .*: reference by default"),
    ],
)
def test_a_table_decides_where_there_is_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Any, kernel: bool, reason: str
) -> None:
    monkeypatch.setattr("tokcompile.lowering.choosekernels._device_name", lambda device: "a GPU")
    rows = {} if row == "no row" else {"a GPU": {"kept_indices": {"int64": row}}}
    (tmp_path / "table.json").write_text(json.dumps({"unmeasured": "reference", "devices": rows}))
    monkeypatch.setenv(TABLE, str(tmp_path / "table.json"))
    choice = choices_of(program()[0].gm)[0]
    assert choice.op == "kept_indices" and choice.kernel == kernel
    assert re.search(reason, choice.reason), choice.reason


@pytest.mark.parametrize("text", ["", '{"unmeasured": "guess"}', '{"devices": {"a": {"b": {"c": "d"}}}}', "[]", None])
def test_a_table_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv(TABLE, str(path))
    with pytest.raises(LowerError, match="table of measured kernels cannot be read") as caught:
        choices_of(program()[0].gm)
    assert str(path) in str(caught.value)


def test_compile_caches_know_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = set()
    for setting in ("off", "on", "auto"):
        monkeypatch.setenv(SETTING, setting)
        tags.add(tag())
    assert len(tags) == 3


def test_inductor_runs_the_kernels_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU only where both the setting and Triton's interpreter are asked for."""
    monkeypatch.setenv(SETTING, "on")
    values = program()[1]
    choices: list[Choice] = []
    found = graphs.traced(prune, *values)
    compiled = lower(
        found.gm, [node.meta["val"] for node in found.graph.nodes if node.op == "placeholder"], "inductor", choices
    )
    assert {choice.op for choice in choices if choice.kernel} == {"kept_indices", "gather_tokens"}
    for one, other in zip(compiled(*values), prune(*values), strict=True):
        assert torch.equal(one, other)


def _check(seen: list, rule: str) -> None:
    choices = [choice for _, each in seen for choice in each if choice.op in kernels.kernel_names()]
    assert not [choice for choice in choices if not choice.kernel], rule
    left = [
        t
        for gm, _ in seen
        for t in targets(gm)
        if t.startswith("tokred.") and t.split(".")[1] in kernels.kernel_names()
    ]
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_runs_kernels_on_cuda(rule: str) -> None:
    """Each operator that has a kernel becomes it, and the model's outputs are those of the references."""
    model, inputs, options = ruleexamples.example(rule)
    wanted = harness.prune(model, **options)(**inputs)
    torch._dynamo.reset()
    with oncuda.lowered_as_on_cuda() as seen:
        found = harness.prune(model, **options)(**inputs)
    assert seen
    _check(seen, rule)
    for one, other in zip(*map(oncuda.tensors, (found.to_tuple(), wanted.to_tuple())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["tokenselect", "h2o", "fastv", "pospad"])
def test_later_steps_run_kernels_on_cuda(rule: str) -> None:
    wanted = ruleexamples.generated(rule, 4)
    with oncuda.lowered_as_on_cuda() as seen:
        found = ruleexamples.generated(rule, 4)
    assert len(seen) > 1
    _check(seen, rule)
    # Votes turn keys themselves: no copy of all keys is made in a step.
    assert [any("turned_votes" in t for t in targets(gm)) for gm, _ in seen[1:]] == [rule == "tokenselect"] * len(
        seen[1:]
    )
    assert torch.equal(found.sequences, wanted.sequences)
    assert harness.difference(torch.stack(found.logits, 1), torch.stack(wanted.logits, 1)) <= 1e-4
