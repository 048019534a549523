"""`tokred bench --kernels`: what it measures and writes, with a clock that needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import kernelcases
import pytest
import torch
from launched import DEVICE
from rich.console import Console
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from tokcompile import kernels
from tokcompile.bench import kernelbench
from tokcompile.bench.kernelbench import Result, Row
from tokcompile.bench.kernelplot import plot
from tokcompile.bench.kernelrivals import RIVALS
from tokcompile.bench.kernelworkloads import WORKLOADS, Maker
from tokcompile.cli import app
from tokcompile.lowering.choosekernels import TABLE, measured

RUN = CliRunner()


def row(size: int, kernel: float, reference: float, op: str = "topk_mask") -> Row:
    return Row(op, "float32", size, size, size + 1, kernel, reference, 0.5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("more", [[], ["--json"], ["--op", "topk_mask"]])
def test_without_a_gpu_nothing_is_measured(more: list[str]) -> None:
    ran = RUN.invoke(app, ["bench", "--kernels", *more])
    assert ran.exit_code == 1
    text = ran.stdout + ran.stderr
    assert "kernels are measured on a GPU, and there is none here" in text
    if "--json" in more:
        assert json.loads(ran.stdout)["ok"] is False


@pytest.mark.parametrize(
    ("words", "said"), [(["--kernels", "--op", "topk"], "did you mean 'topk_mask'"), ([], "tokred bench --kernels")]
)
def test_what_cannot_be_measured_is_said(words: list[str], said: str) -> None:
    ran = RUN.invoke(app, ["bench", *words])
    assert ran.exit_code == 1 and said in ran.stderr


def test_a_clock_queues_calls_behind_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a GPU is never idle between the events of a call; on a stand-in for a GPU that does one thing a tick."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = len(done)

        def elapsed_time(self, end: Event) -> int:
            return end.at - self.at

    class Other:
        def zero_(self) -> None:
            done.append("other")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("idle"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("wait"))
    monkeypatch.setattr(kernelbench, "l2_bytes", lambda: 4)
    monkeypatch.setattr(kernelbench.torch, "empty", lambda size, **_: Other())
    clock = kernelbench.CudaClock(rounds=2, warmup=1)
    assert clock(lambda: done.extend(["call"] * 3)) == 3
    calls = ["call"] * 3
    assert done == [*calls, "idle", "wait", "other", *calls, "other", *calls, "idle"]


def test_every_workload_is_of_an_operator_with_a_kernel() -> None:
    assert set(WORKLOADS) <= kernelcases.all_names()


@pytest.mark.parametrize("op", sorted(WORKLOADS))
def test_a_workload_moves_about_the_bytes_that_it_is_asked_for(op: str) -> None:
    size = 1 << 22
    for dtype in WORKLOADS[op].dtypes:
        args = WORKLOADS[op].make(Maker(torch.device("cpu"), dtype, size))
        assert kernels.kernel_fault(op, args) is None
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = torch.utils._pytree.tree_map(
                lambda v: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v, list(args)
            )
            made = [each for each in tree_leaves(kernels.kernel_op(op)(*fakes)) if isinstance(each, torch.Tensor)]
        assert 0.5 * size <= WORKLOADS[op].moved(args, made) <= 2.5 * size


def test_an_operator_is_measured_against_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """At tiny sizes under the interpreter; a clock that counts calls stands for the GPU's."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def clock(run: Callable[[], object]) -> float:
        run()
        return 2.0

    found = kernelbench.bench(["gather_keys", "attention"], [1 << 14], clock, DEVICE, "a clock")
    assert {r.op for r in found.rows} == {"gather_keys"}
    assert [r.dtype for r in found.rows] == ["bfloat16", "float32"]
    assert all(r.gain == 1 and 0.5 < r.share < 2 for r in found.rows)
    assert found.skipped == {"attention": "no workload in kernelworkloads.py"}
    text = json.loads(json.dumps(found.to_dict()))
    assert text["rows"][0]["moved"] and text["versions"]["torch"]


@pytest.mark.parametrize("op", sorted(RIVALS))
def test_what_a_kernel_is_compared_with_does_the_same_job(op: str) -> None:
    args = WORKLOADS[op].make(Maker(torch.device("cpu"), torch.float32, 1 << 17))
    joint = op in kernels.joint_names()
    wanted = kernels.kernel_op(op)(*args) if joint else getattr(torch.ops.tokred, op)(*args)
    if op == "attend_with_sums":
        wanted = wanted[0].transpose(1, 2)
    for name, rival in RIVALS[op].items():
        if name == "flex":  # for a GPU; the same call as sdpa
            continue
        made = rival(*args)()
        if "sdpa" in name and op == "attention_received":
            assert made.shape == args[0].shape
        elif name == "sdpa, all keys" or op == "keep_keys":  # all keys, and no ends that stay
            assert made.shape == wanted.shape
        elif op == "match_pairs":
            order, partner = made
            count, stay = args[1], wanted.shape[1] - 2 * args[1]
            assert torch.equal(order[:, :count] * 2, wanted[:, stay : stay + count])
            assert partner.shape == (len(order), count)
        else:
            torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", sorted(op for op, load in WORKLOADS.items() if load.usual))
def test_what_runs_without_a_kernel_does_the_same_job(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = WORKLOADS[op]
    args = load.make(Maker(torch.device("cpu"), torch.float32, 1 << 19))
    for made, wanted in zip(load.run()(*args), load.usual()(*args), strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(RIVALS, op, {})
    found = kernelbench.bench([op], [1 << 19], lambda run: run() is not None and 2.0, DEVICE, "a clock")
    assert [(each.op, each.dtype) for each in found.rows] == [(op, "bfloat16"), (op, "float32")]


def test_what_fails_beside_a_kernel_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def rival(*args: object) -> Callable[[], object]:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setitem(RIVALS, "gather_keys", {"gather": RIVALS["gather_keys"]["gather"], "other": rival})
    found = kernelbench.bench(["gather_keys"], [1 << 14], lambda run: run() is not None and 2.0, DEVICE, "a clock")
    assert [each.others for each in found.rows] == [{"gather": 2.0, "other": "out of memory"}] * 2
    text = Console(width=200)
    with text.capture() as shown:
        text.print(kernelbench.render(found, True))
    assert "gather 1.00x, other failed" in shown.get()


def test_the_picture_has_a_line_for_each_kernel_and_dtype() -> None:
    rows = [row(10, 2, 1), row(20, 1, 2), row(10, 1, 2, "fill_mask")]
    picture = plot(Result("a GPU", rows=rows))
    assert picture == plot(Result("a GPU", rows=rows[::-1]))
    assert picture.startswith("<?xml") and "topk_mask float32" in picture and "fill_mask float32" in picture


def test_a_kernel_is_chosen_from_the_size_on_from_which_it_always_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(10, 2, 1), row(20, 1, 2), row(40, 1, 3), row(10, 1, 2, "fill_mask"), row(20, 2, 1, "fill_mask")]
    kernelbench.write_table(Result("a GPU", rows=rows), tmp_path / "made" / "table.json")
    monkeypatch.setenv(TABLE, str(tmp_path / "made" / "table.json"))
    assert measured().devices == {"a GPU": {"topk_mask": {"float32": 21}, "fill_mask": {"float32": None}}}
