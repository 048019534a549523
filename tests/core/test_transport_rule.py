"""Anchors and transport: the method's own figures, and what the matrix of invariants leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
from harness import difference, greedy, prune, refusal
from rulecases import aot

import tokcompile
from tokcompile.rulefile import load_rule

FACTS = {"vision.depth": 26, "decoder.depth": 28, "image.tokens": 729, "grid.width": 27, "grid.height": 27}
STEPS = 4
PADS = (2, 0, 1)


def budgets(facts: dict[str, int], **options: Any) -> tuple[int, int]:
    """How many local anchors a rule asks for before they are shared out, and how many anchors in all."""
    rule = load_rule("aot")
    local, kept = (step for step in rule.steps if step.verb == "select")
    bound = rule.bind(**options)
    return tuple(bound.budget(step, facts["image.tokens"], facts) for step in (local, kept))


@pytest.mark.parametrize(
    ("keep", "local", "kept"), [(126, 63, 126), (108, 54, 108), (180, 90, 180), (100, 50, 95), (729, 364, 729)]
)
def test_budgets_of_the_paper(keep: int, local: int, kept: int) -> None:
    """What does not divide among nine windows is lost; a budget of all tokens keeps all."""
    assert budgets(FACTS, keep=keep) == (local, kept)


def test_places_and_constants_of_the_paper() -> None:
    resolved = load_rule("aot").bind().resolve(FACTS)
    places = [step.at for step in resolved.steps if hasattr(step, "at")]
    assert places == ["vision.5.attention", "vision.24.attention", "projector.output"]
    merge = resolved.steps[-1]
    assert (merge.distance, merge.temperature, merge.hard, merge.marginals) == (0.5, 0.1, 0.1, "plan")
    assert [step.windows for step in resolved.steps if step.verb == "select"] == [3, 1]


def test_one_dropped_token_is_poured_into_all_others() -> None:
    """15 of 16 patches: 7 of them in one window, and 8 others."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS)
    pruned = prune(model, rule="aot", keep=15, windows=1)
    out = pruned(**inputs)
    ran = aot.run(model, inputs, 15, windows=1)
    assert pruned.kept == ran.kept and all(len(row) == 15 for row in ran.kept[0])
    assert difference(out.logits, ran.logits) <= 1e-5


@pytest.mark.parametrize("budget", [9, 11])
def test_a_remainder_among_windows_is_lost(budget: int) -> None:
    """Four windows: of 4 or 5 local anchors each gets one."""
    model = fleet.shared("llava-siglip-qwen2")
    inputs = fleet.example(model, 2)
    pruned = prune(model, rule="aot", keep=budget, windows=2)
    out = pruned(**inputs)
    ran = aot.run(model, inputs, budget)
    assert pruned.kept == ran.kept and {len(row) for row in pruned.kept[0]} == {4 + budget - budget // 2}
    assert difference(out.logits, ran.logits) <= 1e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_generate_equals_runs_by_hand(batch: int) -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, batch, PADS[:batch])
    longer, expected = dict(inputs), []
    for done in range(STEPS):
        expected.append(aot.run(model, longer, 6, generated=done).logits[:, -1])
        word = expected[-1].argmax(-1, keepdim=True)
        longer["input_ids"] = torch.cat([longer["input_ids"], word], 1)
        longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(word)], 1)
    tokcompile.compile(model, rule="aot", keep=6, windows=2, target="eager")
    out = model.generate(**inputs, **greedy(STEPS))
    assert difference(torch.stack(out.logits, 1), torch.stack(expected, 1)) <= 1e-4


@pytest.mark.parametrize(
    ("name", "windows", "cause", "remedy"),
    [
        ("llava", 3, "3 x 3 windows of one size need a patch grid that they divide", "number of windows"),
        ("llava-last", 2, "a budget per image needs the images' own axis", "where it has an axis for images"),
    ],
)
def test_images_without_such_a_grid_are_refused(name: str, windows: int, cause: str, remedy: str) -> None:
    model = fleet.shared(name)
    pruned = prune(model, rule="aot", keep=5, windows=windows)
    with pytest.raises(Exception, match="aot.yaml") as caught:
        pruned(**fleet.example(model))
    assert cause in refusal(caught.value).cause and remedy in refusal(caught.value).remedy
    assert pruned.report.graphs == []


AMONG_CLASS_TOKENS = """
rule: mine
about: Pour patches into each other where a class token stands among them.
params: {}
steps:
  - score: {name: long, by: norm, at: vision.1.output}
  - select: {name: kept, by: topk, scores: long, among: image, keep: 5}
  - merge: {by: transport, at: vision.1.output, keep: kept}
"""


def test_class_tokens_are_not_poured(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(AMONG_CLASS_TOKENS)
    model = fleet.shared("vit")
    pruned = prune(model, rule=str(path))
    with pytest.raises(Exception, match="transport needs the patches of a grid") as caught:
        pruned(**fleet.example(model))
    assert "projector.output" in refusal(caught.value).remedy and "17 tokens" in refusal(caught.value).found
