"""What cannot be an ONNX file is refused, with who brought it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
from torch import Tensor, nn

import tokcompile
from tokcompile.errors import CaptureError, LowerError, RuleError
from tokcompile.kernels import _library
from tokcompile.models import families
from tokcompile.onnx_export import legality
from tokcompile.onnx_export.export import write

pytestmark = pytest.mark.usefixtures("one_thread")


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def program(function: Callable[..., Any], *example: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(Function(function), example)


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_before_any_work(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LowerError, match=f"needs {package}") as caught:
        tokcompile.export_onnx(nn.Linear(2, 2), {}, tmp_path / "m.onnx")
    assert caught.value.remedy == "pip install 'tokcompile[export]'"


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"opset": 17}, LowerError, "opset 17 lacks"),
        ({"target": "onyx"}, LowerError, "unknown target 'onyx'"),
        ({"keep": 3}, RuleError, "options of a rule without a rule"),
        ({"rule": "fastv", "kep": 3}, RuleError, "kep"),
        ({"dynamic": {"pixels": {0: "batch"}}}, CaptureError, "no input 'pixels'"),
        ({"dynamic": {"input_ids": {2: "batch"}}}, CaptureError, "has no dimension 2"),
        ({"dynamic": True}, CaptureError, "two rows or more"),
        ({"dynamic": {"pixel_values": {2: "height"}}}, CaptureError, "cannot be exported with these open dimensions"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], error: type[Exception], why: str, tmp_path: Path) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 1 if options.get("dynamic") is True else 2)
    with pytest.raises(error, match=why):
        tokcompile.export_onnx(model, inputs, tmp_path / "m.onnx", **{"dynamic": False, **options})
    assert not list(tmp_path.iterdir())


def test_a_scatter_of_means_is_refused_at_its_line(tmp_path: Path) -> None:
    """torch writes it as a scatter without any reduction, and says nothing."""

    def means(x: Tensor) -> Tensor:
        index = torch.tensor([[0, 0, 1]]).expand(2, 3)
        return torch.zeros(2, 2).scatter_reduce(1, index, x, "mean")

    with pytest.raises(LowerError, match="no scatter that takes means") as caught:
        write(program(means, torch.ones(2, 3)), tmp_path / "m.onnx")
    assert caught.value.found == "aten.scatter_reduce.two"
    assert Path(__file__).name in caught.value.where[-1]
    assert not list(tmp_path.iterdir())


def test_an_operator_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    with pytest.raises(LowerError, match="aten::kthvalue has no form in ONNX") as caught:
        write(program(lambda x: x.kthvalue(2).values, torch.rand(2, 3)), tmp_path / "m.onnx")
    assert Path(__file__).name in caught.value.where[-1]


@pytest.mark.parametrize("bad", ["kthvalue", "means"])
def test_the_step_of_the_rule_that_brought_an_operator_is_named(
    bad: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of a method that brings an operator of its own, whose reference has no form in ONNX."""
    before = _library.reference_of("key_cosine")

    def reference(x: Tensor, valid: Tensor | None) -> Tensor:
        found = before(x, valid)
        if bad == "kthvalue":
            return found + found.kthvalue(2, keepdim=True).values
        return found.scatter_reduce(2, torch.zeros_like(found, dtype=torch.int64), found, "mean")

    monkeypatch.setitem(_library._references, "key_cosine", reference)
    model = families.decoder("llama", fleet.TEXT | {"num_hidden_layers": 1})
    inputs = fleet.example(model, 2)
    with pytest.raises(LowerError) as caught:
        tokcompile.export_onnx(model, inputs, tmp_path / "m.onnx", "keydiff", budget=5, dynamic=False)
    rule, operator, place = caught.value.where
    assert rule.startswith("rule 'keydiff' tokcompile/rules/keydiff.yaml:") and rule.endswith("(score)")
    assert operator == "operator tokred::key_cosine"
    assert "key_cosine" in place and "self_attn" in place


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x.topk(5).values, 5),
        (lambda x: x.sort(dim=1, stable=True).values, 9),
        (lambda x: x.sort(dim=1).indices, 9),
    ],
)
def test_a_target_that_ranks_few_values(function: Callable[..., Any], count: int) -> None:
    flat = program(function, torch.rand(2, 9))
    decomposed = flat.run_decompositions({})
    legality.check(decomposed, flat, replace(legality.ONNX, most=count))
    with pytest.raises(LowerError, match=f"TopK of {count} values, and small takes at most {count - 1}"):
        legality.check(decomposed, flat, legality.Target("small", most=count - 1))


def test_a_model_that_looks_at_single_rows_is_refused() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([row * 2 for row in x])

    x = torch.rand(3, 4, 2)
    shapes = {"x": {0: torch.export.Dim("rows")}}
    with pytest.raises(CaptureError, match="goes through rows one by one"):
        tokcompile.export(Rows(), {"x": x}, dynamic_shapes=shapes)
    fixed = tokcompile.export(Rows(), {"x": x})
    assert torch.equal(fixed.module()(x=x), Rows()(x))
