"""TensorRT engines, built without a GPU: attention stays in one kernel, and what cannot be built is refused by name."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
from test_cli_export import said
from torch import Tensor, nn

import tokcompile
from tokcompile.errors import CaptureError, LowerError
from tokcompile.models import families, zoo
from tokcompile.onnx_export import tensorrt_library
from tokcompile.onnx_export.engine import Engine, export_tensorrt
from tokcompile.onnx_export.enginelog import layers_in

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(find_spec(tensorrt_library.BINDINGS) is None, reason="the extra tensorrt is not installed"),
]

CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def half(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    """In the type that TensorRT has fused attention for."""
    return model.half(), {k: v.half() if v.is_floating_point() else v for k, v in inputs.items()}


def built(model: nn.Module, inputs: dict[str, Tensor], folder: Path, rule: str, **given: Any) -> Engine:
    """An engine for one architecture, which says of itself what its report says."""
    engine = export_tensorrt(model, inputs, folder / "m.engine", rule, arch="sm89", **given)
    report = json.loads(engine.report.read_text())
    assert engine.path.stat().st_size == report["size"] == engine.size > 10_000
    assert report["archs"] == ["sm89"] and len(report["layers"]) == len(engine.layers)
    assert engine.onnx.operators["Attention"] == len(engine.attention)
    return engine


ROWS = {name: {0: "batch"} for name in ("input_ids", "attention_mask")}
DEMO: dict[str, dict[str, Any]] = {
    "hiprune": {"keep": 65},
    "fastv": {"layer": 1, "keep": "1/3"},
    "tome": {"pairs": 8, "positions": "compact"},
    "pospad": {"keep": "1/2"},
    "snapkv": {"budget": "1/2", "window": 4},
}


@pytest.mark.parametrize("rule", [pytest.param(r, marks=() if r == "hiprune" else pytest.mark.slow) for r in DEMO])
def test_attention_of_the_pruned_demo_model_stays_in_one_kernel(rule: str, tmp_path: Path) -> None:
    loaded = zoo.load("llava-digits")
    model, inputs = half(loaded.model, loaded.example(batch=2))
    engine = built(model, inputs, tmp_path, rule, **DEMO[rule])
    assert len(engine.attention) == 12 and None not in engine.attention.values() and not engine.reason
    steps = {step for layer in engine.layers for step in layer.steps}
    assert steps and all(f"rule '{rule}' tokcompile/rules/{rule}.yaml:" in step for step in steps)


def test_attention_of_a_pruned_clip_l_tower_stays_in_one_kernel(tmp_path: Path) -> None:
    model, inputs = half(families.clip_vision(CLIP_L).eval(), {"pixel_values": torch.rand(1, 3, 336, 336)})
    engine = built(model, inputs, tmp_path, "tome", pairs=20)
    assert len(engine.attention) == 24 and None not in engine.attention.values()
    assert engine.onnx.outputs["last_hidden_state"][1] == 577 - 24 * 20


def test_attention_without_a_fused_kernel_is_said(tmp_path: Path) -> None:
    """TensorRT has none for float32."""
    model = fleet.shared("clip")
    engine = built(model, fleet.example(model, 2), tmp_path, "tome", pairs=2)
    assert set(engine.attention.values()) == {None}
    assert "not supported by a dedicated kernel" in engine.reason


def text() -> tuple[nn.Module, dict[str, Tensor]]:
    model = families.decoder("llama", fleet.TEXT | {"num_hidden_layers": 1}).eval().half()
    return model, fleet.example(model, 2)


def test_open_rows_and_the_steps_after_a_prompt(tmp_path: Path) -> None:
    model, inputs = text()
    engine = export_tensorrt(
        model,
        inputs,
        tmp_path / "prefill.engine",
        "knorm",
        budget=5,
        arch=("sm86", "sm89"),
        dynamic={**ROWS, "position_ids": {0: "batch"}},
        ranges={"batch": (1, 2, 4), "past": (5, 16, 64), "total": (25, 36, 84)},
        decode=tmp_path / "decode.engine",
    )
    assert engine.decode is not None and engine.archs == ["sm86", "sm89"]
    assert {engine.path.name, engine.decode.path.name} == {path.name for path in tmp_path.glob("*.engine")}


@pytest.mark.parametrize(
    ("given", "error", "why"),
    [
        ({"arch": "sm70"}, LowerError, "knows no architecture 'sm70'"),
        pytest.param({"arch": "sm89", "dynamic": True}, LowerError, "TopK of an open number of values"),
        ({"arch": "sm89", "dynamic": ROWS}, LowerError, "no range of batch"),
        ({"arch": "sm89", "dynamic": ROWS, "ranges": {"batch": (3, 2, 4)}}, LowerError, "least, usual and greatest"),
        ({"arch": "sm89", "dynamic": {"pixels": {0: "batch"}}}, CaptureError, "no input 'pixels'"),
    ],
)
def test_options_that_are_wrong(given: dict[str, Any], error: type[Exception], why: str, tmp_path: Path) -> None:
    model, inputs = text()
    with pytest.raises(error, match=why):
        export_tensorrt(model, inputs, tmp_path / "m.engine", "knorm", budget=5, **given)
    assert not list(tmp_path.glob("*.engine"))


def test_an_operator_that_tensorrt_lacks_is_named_with_the_step_that_made_it(tmp_path: Path) -> None:
    model, inputs = text()
    with pytest.raises(LowerError, match="no operators on the bits of numbers") as caught:
        export_tensorrt(model, inputs, tmp_path / "m.engine", "random_kv", budget=5, arch="sm89")
    rule, operator, _ = caught.value.where
    assert rule.startswith("rule 'random_kv' tokcompile/rules/random_kv.yaml:") and rule.endswith("(score)")
    assert operator == "operator tokred::random_keys"


def test_an_operator_that_the_parser_refuses_is_named_with_its_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As one that no table knows of."""
    from tokcompile.onnx_export import legality

    monkeypatch.setitem(legality.TARGETS, "tensorrt", legality.ONNX)
    model, inputs = text()
    with pytest.raises(LowerError, match="cannot read operator|cannot build this model") as caught:
        export_tensorrt(model, inputs, tmp_path / "m.engine", "random_kv", budget=5, arch="sm89")
    assert caught.value.where and caught.value.found and caught.value.remedy


@pytest.mark.parametrize("package", [tensorrt_library.BINDINGS, tensorrt_library.LIBRARIES])
def test_a_missing_package_is_named_before_any_work(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = tensorrt_library.importlib.util.find_spec
    tensorrt_library._for_rtx.cache_clear()
    monkeypatch.setattr(tensorrt_library.importlib.util, "find_spec", lambda n: None if n == package else found(n))
    with pytest.raises(LowerError, match=package) as caught:
        export_tensorrt(nn.Linear(2, 2), {}, tmp_path / "m.engine", "tome")
    assert caught.value.remedy == "pip install 'tokcompile[tensorrt]'"


def test_a_target_of_torch_compile_whose_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    model = fleet.shared("clip")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="tokred", options={"rule": "tome", "pairs": 2, "target": "tensorrt"})
    with pytest.raises(Exception, match="needs torch_tensorrt, which cannot be imported"):
        compiled(**fleet.example(model, 2))


def test_layers_are_read_from_what_the_builder_says() -> None:
    said_by_it = [
        "Engine Layer Information:\n"
        "Name: _gemm_mha_v2_7, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [2] }], TacticName: t, StreamId: 0, "
        "Metadata: [ONNX Layer: node_attention][ONNX Layer: node_cast]\n"
        "Name: move, LayerType: kgen, Inputs: [], StreamId: 0, Metadata: ",
        "Registering layer: node_attention",
    ]
    attention, move = layers_in(said_by_it, {"node_cast": "rule 'x' x.yaml:3 (score)"})
    assert (attention.name, attention.kind) == ("_gemm_mha_v2_7", "kgen")
    assert attention.sources == ["node_attention", "node_cast"]
    assert attention.steps == ["rule 'x' x.yaml:3 (score)"]
    assert (move.name, move.sources, move.steps) == ("move", [], [])


def test_the_command_line_writes_an_engine_and_its_report(tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    words = ["export", "zoo:clip-tiny", "tome", "pairs=2", "--target", "tensorrt", "--arch", "sm89", "-o", path]
    (engine,) = said([*words, "--dtype", "float16"])["engines"]
    assert Path(engine["path"]) == path and path.exists() and Path(engine["report"]).exists()
    assert "tensorrt" in said([*words[:4], "--arch", "sm89"], code=1)["error"]["remedy"]
    assert "three sizes" in said([*words, "--range", "batch=1,2"], code=1)["error"]["cause"]
    assert "float32" in said([*words, "--dtype", "float8"], code=1)["error"]["remedy"]


def test_the_public_name() -> None:
    assert tokcompile.export_tensorrt is export_tensorrt
