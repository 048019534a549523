"""Models of real proportions: the rewrite of a 7B in a second, and a fresh process without an import of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import scale
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from tokcompile.capturing.capture import capture
from tokcompile.pipeline import apply_rules
from tokcompile.rulefile import parse_rules

SCRIPT = Path(__file__).parent / "fresh_process.py"


@pytest.mark.slow
def test_a_7b_is_rewritten_in_a_second() -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig()).eval()
    config = model.config
    assert (config.text_config.num_hidden_layers, config.vision_config.hidden_size) == (32, 1024)
    ids = torch.full((1, 640), 7, device="meta")
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        "pixel_values": torch.zeros(1, 3, 336, 336, device="meta"),
    }
    programs = capture(model, inputs)
    assert len(programs) == 1
    seconds = []
    for _ in range(3):
        program = programs[0].copy()
        start = time.process_time()
        applied = apply_rules(program, parse_rules({"rule": "fastv"}), check=False)
        seconds.append(time.process_time() - start)
    assert applied[0].steps[-1]["from"] == "576"
    assert program.output.args[0][0].meta["val"].shape[1] == 640 - 288
    assert min(seconds) < 1.0, f"sites, axes and rewrite took {min(seconds):.2f} s"


@pytest.mark.slow
@pytest.mark.parametrize("name", scale.SUBJECTS)
def test_eighty_layers_take_two_seconds_and_time_is_linear(name: str, one_thread: None) -> None:
    """Best of three; a node takes no longer in a deep model than in one of a third of its depth."""
    subject = scale.SUBJECTS[name]
    few, many = (scale.measure(subject, scale.captured(subject, layers), layers) for layers in (24, 80))
    assert many.total < 2.0, f"{many.total:.2f} s"
    assert many.per_node < 1.5 * few.per_node, f"{few.per_node:.0f} µs a node, then {many.per_node:.0f}"


@pytest.mark.slow
def test_a_fresh_process_without_an_import(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["compile", "generate", "api"]
