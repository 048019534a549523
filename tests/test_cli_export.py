"""`tokred export` and `tokred run`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import onnxed
import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from tokcompile.cli import app
from tokcompile.models import digits

RUN = CliRunner()


def said(words: list[Any], code: int = 0) -> Any:
    result = RUN.invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def picture(pixels: Tensor, path: Path) -> Path:
    """What a user has: pixels of a model's input as a PNG."""
    values = ((pixels * digits.STD + digits.MEAN) * 255).round().clamp(0, 255).byte()
    Image.fromarray(values.permute(1, 2, 0).numpy()).save(path)
    return path


def test_a_model_of_the_zoo_is_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "m.onnx"
    words = ["export", "zoo:llava-tiny", "fastv", "layer=1", "keep=4", "--fixed", "--batch", 1, "-o", path]
    shown = RUN.invoke(app, [*map(str, words)])
    assert shown.exit_code == 0, shown.output
    assert f"wrote {path}: {len(onnxed.onnx.load(path).graph.node)} operators of opset 18" in shown.stdout
    returned = onnxed.session(path).get_outputs()[0]
    assert f"returns {returned.name} {returned.shape}" in shown.stdout
    assert "does not check: batch rows hold different numbers of image tokens" in shown.stdout


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    error = said(["export", "zoo:llava-tiny", "fastv"], code=1)["error"]
    assert "needs onnxscript" in error["cause"]
    assert error["remedy"] == "pip install 'tokcompile[export]'"


@pytest.mark.parametrize(
    ("image", "prompt", "why"),
    [
        ("picture.png", "which digit is purple", "does not know the word 'purple'"),
        ("text", "which digit is red?", "cannot be read as an image"),
        ("nothing", "which digit is red", "cannot be read as an image"),
        ("picture.png", "which digit is red", "no file"),
    ],
)
def test_what_cannot_be_asked(image: str, prompt: str, why: str, tmp_path: Path) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "picture.png")
    (tmp_path / "text").write_text("no image")
    words = ["run", tmp_path / "no.onnx", "--image", tmp_path / image, "--prompt", prompt]
    error = said(words, code=1)["error"]
    assert why in error["cause"]


@pytest.mark.slow
def test_the_model_of_the_demo_answers(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("prefill.onnx", "decode.onnx")]
    given = ["export", "zoo:llava-digits", "hiprune", "keep=65", "--out", files[0], "--decode", files[1]]
    written = said(given)["files"]
    assert [file["path"] for file in written] == [str(path) for path in files]
    for file in written:
        assert [value.name for value in onnxed.session(file["path"]).get_inputs()] == list(file["inputs"])
    canvases = digits.canvases("test", 4, 11)
    image = picture(canvases.pixel_values[0], tmp_path / "digits.png")
    for colour, digit in zip(digits.COLOURS, canvases.labels[0].tolist(), strict=True):
        words = ["run", files[0], "--decode", files[1], "--image", image, "--prompt", f"Which digit is {colour}?"]
        assert said(words)["answer"] == [str(digit)]
        assert said([*words[:2], *words[4:]])["answer"] == [str(digit)]
