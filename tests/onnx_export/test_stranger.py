"""The trained model of the demo as files that a runtime without PyTorch answers questions with."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import greedy
from torch import Tensor, nn

import tokcompile
from tokcompile.demo_data import Questions, digit_questions
from tokcompile.models import zoo
from tokcompile.models.digits import EOS, TOKEN
from tokcompile.onnx_export.extra import needs

RULES = {
    "fastv": {"layer": 1, "keep": "1/3"},
    "hiprune": {"keep": 65},
    "tome": {"pairs": 8, "positions": "compact"},
    "pospad": {"keep": "1/2"},
    "snapkv": {"budget": "1/2", "window": 4},
}
SIZES = ((100, ()), (25, ("is", "digit", "which")))
"""Rows that are asked at once, and words before each question."""
IMAGES = 100
QUESTION = len("which digit is red".split())
SLOTS = {"pospad"}
"""Rules that leave empty slots in front of a text, whose values are unspecified."""
needs("onnx", "onnxruntime")


def after(words: tuple[str, ...], questions: Questions) -> Questions:
    """The same questions, each after some words."""
    ids = questions.input_ids
    first = torch.tensor([[TOKEN[word] for word in words]], dtype=ids.dtype).expand(len(ids), len(words))
    return replace(questions, input_ids=torch.cat([ids[:, :-QUESTION], first, ids[:, -QUESTION:]], 1))


def strange(files: list[Path], questions: Questions, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and the prompts' logits that two files give in another process."""
    asked, told = (files[0].with_name(name) for name in ("questions.npz", "answers.npz"))
    np.savez(asked, input_ids=questions.input_ids.numpy(), pixel_values=questions.pixel_values.numpy())
    words = [Path(__file__).with_name("stranger.py"), *files, asked, told, rows]
    done = subprocess.run([sys.executable, "-I", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(told)
    return torch.from_numpy(found["tokens"]), torch.from_numpy(found["logits"])


@torch.no_grad()
def compiled(model: nn.Module, questions: Questions, rule: str) -> tuple[Tensor, Tensor]:
    """The same by `generate` and by a call of the compiled model."""
    torch._dynamo.reset()
    tokcompile.compile(model, rule=rule, target="eager", **RULES[rule])
    prompt = {**questions.rows(0, len(questions)), "attention_mask": torch.ones_like(questions.input_ids)}
    logits = model(**prompt).logits
    tokens = model.generate(**prompt, **greedy(3)).sequences[:, -3:]
    tokcompile.restore(model)
    return tokens, logits


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_stranger_gets_the_answers_of_the_compiled_model(rule: str, tmp_path: Path) -> None:
    """All tokens that `generate` generates for a hundred images, at two batch sizes and two lengths, from one file."""
    model, questions = zoo.load("llava-digits").model, digit_questions(IMAGES)
    files = [tmp_path / name for name in ("prefill.onnx", "decode.onnx")]
    tokcompile.export_onnx(model, questions.rows(0, 3), files[0], rule, decode=files[1], **RULES[rule])
    for rows, words in SIZES:
        asked = after(words, questions)
        assert asked.input_ids.shape == (IMAGES, questions.input_ids.shape[1] + len(words))
        tokens, logits = strange(files, asked, rows)
        expected, near = compiled(model, asked, rule)
        assert tokens.tolist() == expected.tolist()
        real = slice(-QUESTION if rule in SLOTS else 0, None)
        # Of logits above 10, 1e-5 is what float32 sums in another order give.
        torch.testing.assert_close(logits[:, real], near[:, real], rtol=1e-5, atol=1e-4)
        if not words:  # the questions that it was trained for: nearly always the right digit
            assert (tokens[:, 0] == questions.answers).float().mean() > 0.8
            assert (tokens[:, 1] == EOS).float().mean() > 0.9
