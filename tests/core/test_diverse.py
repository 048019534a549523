"""select, by diverse: on features of images, from a token that scores name, and where it has no meaning."""

from __future__ import annotations

from pathlib import Path

import families
import fleet
import naive
import pytest
import torch
from harness import prune, refusal
from torch import Tensor

from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
RULE = """
rule: spread
about: Keep tokens that are far from each other.
params:
  keep: {{type: ratio_or_count, default: 5, about: tokens of each image}}
steps:
  - tap: {{name: tokens, at: {at}, what: output}}
{more}  - select: {{name: kept, by: diverse, like: tokens, keep: "${{keep}}"{scores}}}
  - drop: {{at: projector.input, keep: kept}}
"""
SCORES = "  - score: {name: length, by: norm, at: projector.input}\n"


def rule(folder: Path, at: str = "projector.input", scored: bool = False) -> str:
    path = folder / "spread.yaml"
    path.write_text(RULE.format(at=at, more=SCORES if scored else "", scores=", scores: length" if scored else ""))
    return str(path)


def walk(tokens: Tensor, first: int | None, budget: int) -> list[int]:
    """The tokens of a walk that begins at one of them, or at the loneliest."""
    if first is None:
        return sorted(naive.spread_out(tokens, budget))
    units = tokens / tokens.norm(dim=1, keepdim=True)
    apart, found = 1 - units @ units.T, [first]
    while len(found) < budget:
        nearest = apart[found].amin(0)
        found.append(max((i for i in range(len(tokens)) if i not in found), key=lambda i: nearest[i].item()))
    return sorted(found)


@pytest.mark.parametrize("name", ["llava", "llava-siglip-qwen2"])
@pytest.mark.parametrize("scored", [False, True])
def test_features_of_each_image_are_spread_out(name: str, scored: bool, tmp_path: Path) -> None:
    model = fleet.shared(name)
    inputs = fleet.example(model, 3)
    pruned = prune(model, rule=rule(tmp_path, scored=scored))
    pruned(**inputs)
    with torch.no_grad():
        features = naive.vision_features(model, inputs["pixel_values"]).double()
    starts = features.norm(dim=2).argmax(1).tolist() if scored else [None] * len(features)
    assert pruned.kept[0] == [walk(each, first, 5) for each, first in zip(features, starts, strict=True)]


def test_patches_that_become_one_feature_together_are_refused(tmp_path: Path) -> None:
    it = families.subject(catalogue.family("internvl"))
    with pytest.raises(Exception, match="several patches become one feature") as caught:
        prune(it.model, rule=rule(tmp_path, "vision.0.output"))(**it.inputs)
    error = refusal(caught.value)
    assert "projector.input" in error.remedy and any("spread.yaml" in place for place in error.where)


def test_queries_of_heads_are_no_tokens(tmp_path: Path) -> None:
    path = tmp_path / "spread.yaml"
    path.write_text(RULE.format(at="decoder.0.attention", more="", scores="").replace("what: output", "what: q"))
    model = fleet.shared("llava")
    with pytest.raises(Exception, match="tokens are compared in a value") as caught:
        prune(model, rule=str(path))(**fleet.example(model, 2))
    assert refusal(caught.value).where
