"""OpenVINO reads the same files: it computes whole numbers in 32 bits, and chooses the same tokens all the same."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fleet
import numpy as np
import onnxed
import pytest

import tokcompile
from tokcompile.models import families

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec("openvino") is None, reason="the extra openvino is not installed"),
]
RULES: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "keep": 4},
    "hiprune": {"keep": 6},
    "tome": {"pairs": 3, "positions": "compact"},
    "knorm": {"budget": 8},
}


@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(
    "rule", ["fastv", "tome", *(pytest.param(r, marks=pytest.mark.slow) for r in ("hiprune", "knorm"))]
)
def test_openvino_says_what_onnx_runtime_says(rule: str, opset: int, tmp_path: Path) -> None:
    import openvino

    model = families.llava(fleet.VISION, fleet.TEXT | {"num_hidden_layers": 2}, image_token_index=fleet.IMAGE).eval()
    example = fleet.example(model, 2)
    file = tokcompile.export_onnx(model, example, tmp_path / "m.onnx", rule, dynamic=False, opset=opset, **RULES[rule])
    inputs = fleet.example(model, 2, seed=3)
    expected = onnxed.run(file, inputs)
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file.path), "CPU", exact)
    found = compiled({name: inputs[name].numpy() for name in file.inputs})
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-4, err_msg=name)
