"""Every rule of the library as an ONNX file: ONNX Runtime says what the eager target says, for sizes of all sorts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fleet
import numpy as np
import onnxed
import pytest
import torch
from harness import prune
from onnxed import run
from rulecases import CASES, RULES
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tokcompile
from tokcompile.models import families
from tokcompile.models.catalogue import family
from tokcompile.onnx_export.dynamic import axes_of, dynamic_shapes
from tokcompile.onnx_export.export import Exported, write

pytestmark = pytest.mark.usefixtures("one_thread")

NEAR = 1e-4
USUAL = {
    "hiprune": {"keep": "1/3", "alpha": 0.7},
    "tome": {"pairs": 3, "positions": "compact"},
    "pospad": {"keep": "1/3"},
    "snapkv": {"budget": "1/3", "window": 2, "kernel": 3},
}
"""A drop at the projector, merges, marks, and an eviction."""
SHAPES = ((2, 11), (4, 5))
"""Rows and words of the text, other ones than the exported example has."""
FIXED_LENGTH = {
    "pyramidkv": "a budget of layers is known when a prompt is captured",
    "treekv": "a budget of layers is known when a prompt is captured",
}


def options(rule: str, model: nn.Module) -> dict[str, Any]:
    known = CASES[rule]
    return known.options(model, next((keep for keep in known.keeps if keep != "all"), "all"))


def close(file: Exported, inputs: dict[str, Tensor], expected: Any, last: bool = False) -> None:
    """Ask that logits and caches are those of a compiled model; of padded rows, those of the last token alone."""
    found = run(file, inputs)
    logits = expected.logits.numpy()
    assert found["logits"].shape == logits.shape
    np.testing.assert_allclose(
        found["logits"][:, -1 if last else slice(None)], logits[:, -1 if last else slice(None)], atol=NEAR
    )
    cache = getattr(expected, "past_key_values", None)
    for number, layer in enumerate(cache.layers if cache is not None and not last else ()):
        for name, value in (("key", layer.keys), ("value", layer.values)):
            np.testing.assert_allclose(found[f"present.{number}.{name}"], value.numpy(), atol=NEAR)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rule for rule in RULES if CASES[rule].models])
def test_a_file_says_what_the_rewritten_program_says(rule: str, tmp_path: Path) -> None:
    """From one file: two numbers of rows, two lengths, and rows that are padded."""
    model = fleet.shared(CASES[rule].models[0])
    example = fleet.example(model, 3)
    given = options(rule, model)
    axes = {name: {0: "batch"} for name in example} if rule in FIXED_LENGTH else axes_of(model, example, True)
    program = tokcompile.export(model, example, dynamic_shapes=dynamic_shapes(example, axes))
    program = tokcompile.rewrite(program, rule, **given)
    file = write(program, tmp_path / "m.onnx", axes=axes)
    eager = torch.no_grad()(program.module())
    for batch, text in SHAPES:
        inputs = fleet.example(model, batch, text=7 if rule in FIXED_LENGTH else text, seed=text)
        close(file, inputs, eager(**inputs))
    padded = fleet.example(model, 3, (2, 0, 1))
    close(file, padded, eager(**padded), last=True)


def video() -> tuple[nn.Module, dict[str, Tensor]]:
    known = family("llava_onevision")
    config = known.config | {"vision_config": known.config["vision_config"] | {"image_size": 24}}
    known = known.model_copy(update={"config": config})
    model = known.build()
    return model, known.example(model, batch=2, images=0, videos=1)


def tower(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    model = fleet.shared(name)
    return model, fleet.example(model, 3)


OTHERS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Tensor]]], dict[str, Any]]] = {
    "aot_video": (video, {"anchors": 12, "windows": 3, "cells": 3, "ratio": 1.0, "clip": 5}),
    "hita": (lambda: tower("vit"), {"block": 1, "queries": 4}),
    "image": (lambda: tower("clip"), {"block": 1, "tokens": 4, "std": 1.0}),
}
"""Rules that fit none of the models that the others fit, and their options."""


def test_every_rule_is_tested_here() -> None:
    assert {rule for rule in RULES if not CASES[rule].models} == set(OTHERS)


@pytest.mark.slow
@pytest.mark.parametrize("rule", OTHERS)
def test_a_file_of_another_kind_says_what_the_rewritten_program_says(rule: str, tmp_path: Path) -> None:
    make, given = OTHERS[rule]
    model, inputs = make()
    program = tokcompile.rewrite(tokcompile.export(model, inputs), rule, **given)
    file = write(program, tmp_path / "m.onnx")
    taken = tokcompile.precompute(model, inputs)
    expected = pytree.tree_leaves(torch.no_grad()(program.module())(**taken))
    found = run(file, taken)
    assert len(found) == len(expected)
    for name, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(found[name], value.numpy(), atol=NEAR, err_msg=name)


def small() -> nn.Module:
    """A LLaVA with one block of text after the cut, so that its export takes seconds."""
    return families.llava(fleet.VISION, fleet.TEXT | {"num_hidden_layers": 2}, image_token_index=fleet.IMAGE).eval()


def test_a_file_of_open_sizes_says_what_a_compiled_model_says(tmp_path: Path) -> None:
    model = small()
    given = {"rule": "fastv", "layer": 1, "keep": "1/3"}
    file = tokcompile.export_onnx(model, fleet.example(model, 3), tmp_path / "m.onnx", **given)
    assert file.inputs["input_ids"] == ["batch", "length"]
    assert file.outputs["logits"] == ["batch", "length - 11", 64]
    assert file.outputs["present.1.key"] == ["batch", 2, "length - 11", 16]
    assert file.unchecked == ["batch rows hold different numbers of image tokens"]
    held = {entry.key: entry.value for entry in onnxed.onnx.load(file.path).metadata_props}
    assert json.loads(held["tokred.rules"]) == [{"rule": "fastv", "params": {"layer": 1, "keep": "1/3"}}]
    assert (held["tokcompile"], held["torch"]) == (tokcompile.__version__, torch.__version__)
    for batch, text in SHAPES:
        inputs = fleet.example(model, batch, text=text, seed=text)
        torch._dynamo.reset()
        close(file, inputs, prune(model, **given)(**inputs))


@pytest.mark.parametrize("rule", USUAL)
def test_a_file_of_fixed_sizes_says_what_a_compiled_model_says(rule: str, tmp_path: Path) -> None:
    model = small()
    example = fleet.example(model, 2)
    file = tokcompile.export_onnx(model, example, tmp_path / "m.onnx", rule, dynamic=False, **USUAL[rule])
    assert file.inputs["input_ids"] == [2, 24]
    inputs = fleet.example(model, 2, seed=3)
    close(file, inputs, prune(model, rule=rule, **USUAL[rule])(**inputs))


def test_fused_operators_of_a_later_opset_take_any_batch(tmp_path: Path) -> None:
    """torch leaves the tables of a fused rotary embedding one row, and ONNX wants one of each of the batch."""
    model = families.decoder("llama", fleet.TEXT | {"num_hidden_layers": 2}).eval()
    given = {"rule": "snapkv", "budget": 6, "window": 2, "kernel": 3}
    file = tokcompile.export_onnx(model, fleet.example(model, 2), tmp_path / "m.onnx", opset=23, **given)
    assert file.operators["Attention"] == 2 and file.opset == 23
    inputs = fleet.example(model, 3, text=15)
    close(file, inputs, prune(model, **given)(**inputs))


def test_operators_say_which_step_brought_them_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    model = small()
    path = tokcompile.export_onnx(
        model, fleet.example(model, 2), tmp_path / "m.onnx", "fastv", dynamic=False, layer=1, keep=4
    ).path
    held = [{entry.key: entry.value for entry in node.metadata_props} for node in onnxed.onnx.load(path).graph.node]
    verbs = {found["tokred.step"].rpartition("(")[2] for found in held if "tokred.step" in found}
    assert {"score)", "select)", "drop)"} <= verbs
    assert any(found.get("tokred.operator") == "operator tokred::topk_mask" for found in held)
    assert str(Path(torch.__file__).parent.parent).encode() not in path.read_bytes()


def test_weights_go_to_a_file_beside(tmp_path: Path) -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(300, 300))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model, x = Product(), torch.rand(2, 300)
    whole = tokcompile.export_onnx(model, {"x": x}, tmp_path / "whole.onnx")
    parted = tokcompile.export_onnx(model, {"x": x}, tmp_path / "parted.onnx", external_data=True)
    assert (tmp_path / "parted.onnx.data").stat().st_size >= 4 * 300 * 300 > parted.path.stat().st_size
    assert not (tmp_path / "whole.onnx.data").exists()
    for file in (whole, parted):
        assert file.inputs == {"x": ["batch", 300]}
        np.testing.assert_allclose(run(file, {"x": x})["output"], (x @ model.weight).detach().numpy(), rtol=1e-5)
