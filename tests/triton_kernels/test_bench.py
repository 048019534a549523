"""`tokred bench --kernels`: what it measures and writes, with a clock that needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import kernelcases
import pytest
import torch
from launched import DEVICE
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from tokcompile import kernelbench, kernels
from tokcompile.choosekernels import TABLE, measured
from tokcompile.cli import app
from tokcompile.kernelbench import Result, Row
from tokcompile.kernelworkloads import WORKLOADS, Maker

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


def test_a_kernel_is_chosen_from_the_size_on_from_which_it_always_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(10, 2, 1), row(20, 1, 2), row(40, 1, 3), row(10, 1, 2, "fill_mask"), row(20, 2, 1, "fill_mask")]
    kernelbench.write_table(Result("a GPU", rows=rows), tmp_path / "made" / "table.json")
    monkeypatch.setenv(TABLE, str(tmp_path / "made" / "table.json"))
    assert measured().devices == {"a GPU": {"topk_mask": {"float32": 21}, "fill_mask": {"float32": None}}}
