"""A prompt's file and a step's file generate what a compiled model generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import numpy as np
import pytest
import torch
from harness import greedy
from torch import nn

import tokcompile
from tokcompile.errors import CaptureError
from tokcompile.models import families
from tokcompile.onnx_export import generator
from tokcompile.onnx_export.extra import needs

needs("onnx", "onnxruntime")
pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 5
RULES: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "keep": "1/3"},
    "hiprune": {"keep": "1/3", "alpha": 0.7},
    "tome": {"pairs": 3, "positions": "compact"},
    "pospad": {"keep": "1/3"},
    "knorm": {"budget": 8},
}


def llava() -> nn.Module:
    return families.llava(fleet.VISION, fleet.TEXT | {"num_hidden_layers": 2}, image_token_index=fleet.IMAGE).eval()


def llama() -> nn.Module:
    return families.decoder("llama", fleet.TEXT | {"num_hidden_layers": 1}).eval()


def checked(model: nn.Module, rule: str | None, folder: Path, sizes: Any, dynamic: bool = True, **given: Any) -> None:
    """Export on one example, and generate for others: rows, padding of each, and words of the text."""
    files = folder / "prefill.onnx", folder / "decode.onnx"
    example = fleet.example(model, 3)
    file = tokcompile.export_onnx(model, example, files[0], rule, decode=files[1], dynamic=dynamic, **given)
    assert file.decode is not None
    layout = {name.replace("present", "past"): shape[1::2] for name, shape in file.outputs.items() if "present" in name}
    assert {name: shape[1::2] for name, shape in file.decode.inputs.items() if "past" in name} == layout
    assert [name for name in file.decode.outputs if "present" in name] == [n for n in file.outputs if "present" in n]
    prefill, decode = (generator.session(path) for path in files)
    for batch, pads, text in sizes:
        inputs = fleet.example(model, batch, pads, text=text, seed=text)
        found = generator.generate(prefill, decode, {k: v.numpy() for k, v in inputs.items()}, TOKENS)
        torch._dynamo.reset()
        if rule is not None:
            tokcompile.compile(model, rule=rule, target="eager", **given)
        expected = model.generate(**inputs, **greedy(TOKENS)).sequences[:, -TOKENS:]
        tokcompile.restore(model)
        assert found.tolist() == expected.tolist()


def test_a_prompt_of_fixed_sizes_and_its_steps(tmp_path: Path) -> None:
    checked(llama(), "snapkv", tmp_path, [(3, (0, 2, 1), 7)], dynamic=False, budget=4, window=2, kernel=3)


@pytest.mark.slow
def test_an_eviction_and_its_steps(tmp_path: Path) -> None:
    checked(llama(), "snapkv", tmp_path, [(2, (0, 2), 15), (4, (), 11)], budget=6, window=2, kernel=3)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [None, *RULES])
def test_an_image_and_its_steps(rule: str | None, tmp_path: Path) -> None:
    checked(llava(), rule, tmp_path, [(2, (0, 2), 11), (4, (), 5)], **RULES.get(rule or "", {}))


def test_a_model_without_a_text_has_no_steps(tmp_path: Path) -> None:
    model = fleet.shared("clip")
    with pytest.raises(CaptureError, match="takes `input_ids` and `past_key_values`"):
        tokcompile.export_onnx(model, fleet.example(model, 2), tmp_path / "p.onnx", decode=tmp_path / "d.onnx")


def test_a_row_that_is_over_repeats_its_end() -> None:
    """With sessions that say the next number, and end at 3."""

    class Value:
        def __init__(self, name: str) -> None:
            self.name = name

    class Count:
        def get_inputs(self) -> list[Value]:
            return [Value("input_ids")]

        def get_outputs(self) -> list[Value]:
            return [Value("logits"), Value("present.0.key")]

        def run(self, names: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            assert list(feed) == ["input_ids"] and names == ["logits", "present.0.key"]
            return [np.eye(9)[feed["input_ids"] + 1], np.zeros(1)]

    ids = np.array([[7, 1], [7, 0]])
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    assert generator.generate(Count(), Count(), given, 9, end=3).tolist() == [[2, 3, 3], [1, 2, 3]]
    assert generator.generate(Count(), Count(), given, 4).tolist() == [[2, 3, 4, 5], [1, 2, 3, 4]]
    assert generator.cache({"present.0.key": ids, "logits": ids}).keys() == {"past.0.key"}
