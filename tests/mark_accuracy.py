"""Answers of the digits model when image tokens are dropped, and when markers stand in their places.

    python tests/mark_accuracy.py [IMAGES]

The same tokens stay in both. A table goes to standard output: answers that are right, slots, and tokens in them.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # torchvision may be of another torch
    import unloaded

    unloaded.declare_operators()

import torch
from harness import prune
from torch import nn

from tokcompile.demo_data import Questions, digit_questions
from tokcompile.models import zoo

RULE = """
rule: tried
about: Keep the image tokens of the best score, where they stand.
params:
  keep: {type: ratio_or_count, default: "1/3", about: image tokens kept of each image}
steps:
  - score: {name: score, SCORE}
  - select: {name: kept, by: topk, scores: score, keep: "${keep}"}
  - STEP
"""
SCORES = {
    "attention of the last vision block": "by: attention_received, at: vision.features.attention",
    "random": "by: random, at: projector.output, seed: 5",
}
STEPS = {
    "dropped": "drop: {at: decoder.0.input, keep: kept, positions: keep}",
    **{
        f"marked, {content}": f"mark: {{at: decoder.0.input, keep: kept, content: {content}}}"
        for content in ("zero", "run_mean", "mean")
    },
}
BATCH = 32


@torch.no_grad()
def measure(model: nn.Module, questions: Questions, **options: Any) -> tuple[int, int, float]:
    """Right answers, tokens or slots of each row, and the mean number of tokens in them."""
    torch._dynamo.reset()
    pruned = prune(model, **options)
    right, held, slots = 0, 0, 0
    for start in range(0, len(questions), BATCH):
        inputs = questions.rows(start, BATCH)
        logits = pruned(**inputs, use_cache=False).logits[:, -1]
        right += int((logits.argmax(-1) == questions.answers[start : start + BATCH]).sum())
        (maps,) = pruned.recording.maps.values()
        slots, held = maps.shape[1], held + int((maps != -1).sum())
    return right, slots, held / len(questions)


def main(images: int) -> None:
    """Print the table."""
    model, questions = zoo.load("llava-digits").model, digit_questions(images)
    with torch.no_grad():
        right = sum(
            int((model(**questions.rows(s, BATCH)).logits[:, -1].argmax(-1) == questions.answers[s : s + BATCH]).sum())
            for s in range(0, images, BATCH)
        )
    print(f"unpruned: {right} of {images}, {questions.input_ids.shape[1]} tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tried.yaml"
        for (score, by), keep, (name, step) in itertools.product(SCORES.items(), ("1/3", "1/6"), STEPS.items()):
            path.write_text(RULE.replace("SCORE", by).replace("STEP", step))
            right, slots, held = measure(model, questions, rule=str(path), keep=keep)
            print(f"{score}, keep {keep}, {name}: {right} of {images}, {slots} slots, {held:.1f} tokens", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 256)
