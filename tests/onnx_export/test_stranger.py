"""The trained model of the demo as files that a runtime without PyTorch answers questions with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import greedy

import tokcompile
from tokcompile.demo_data import digit_questions
from tokcompile.models import zoo
from tokcompile.models.digits import EOS
from tokcompile.onnx_export.extra import needs

RULES = {
    "fastv": {"layer": 1, "keep": "1/3"},
    "hiprune": {"keep": 65},
    "tome": {"pairs": 8, "positions": "compact"},
    "pospad": {"keep": "1/2"},
    "snapkv": {"budget": "1/2", "window": 4},
}
needs("onnx", "onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_stranger_gets_the_answers_of_the_compiled_model(rule: str, tmp_path: Path) -> None:
    """All tokens that `generate` generates for a hundred images, among them nearly always the right digit."""
    loaded = zoo.load("llava-digits")
    questions = digit_questions(100)
    files = [tmp_path / name for name in ("prefill.onnx", "decode.onnx")]
    tokcompile.export_onnx(loaded.model, questions.rows(0, 3), files[0], rule, decode=files[1], **RULES[rule])
    np.savez(tmp_path / "q.npz", input_ids=questions.input_ids.numpy(), pixel_values=questions.pixel_values.numpy())
    script = Path(__file__).with_name("stranger.py")
    done = subprocess.run(
        [sys.executable, "-I", str(script), *map(str, files), str(tmp_path / "q.npz")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.tensor(json.loads(done.stdout))
    tokcompile.compile(loaded.model, rule=rule, target="eager", **RULES[rule])
    prompt = {**questions.rows(0, 100), "attention_mask": torch.ones_like(questions.input_ids)}
    out = loaded.model.generate(**prompt, **greedy(3))
    expected = out.sequences[:, -3:]
    assert found.tolist() == expected.tolist()
    assert (found[:, 0] == questions.answers).float().mean() > 0.8
    assert (found[:, 1] == EOS).float().mean() > 0.9
