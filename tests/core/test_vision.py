"""Drops inside a vision tower: class tokens stay, and what reads the patches later follows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import naive
import pytest
import torch
from harness import difference, prune, refusal

import tokcompile

RULE = """
rule: longest
about: Drop the patches whose vectors are short, before a vision block.
params:
  layer: {type: int, default: 1, min: 0, about: the block}
  keep: {type: ratio_or_count, default: 6, about: tokens kept}
steps:
  - score: {name: long, by: norm, at: "vision.${layer}.input"}
  - select: {name: kept, by: topk, scores: long, keep: "${keep}", among: image}
  - drop: {at: "vision.${layer}.input", keep: kept, positions: compact}
"""


@pytest.fixture
def rule(tmp_path: Path) -> str:
    path = tmp_path / "longest.yaml"
    path.write_text(RULE)
    return str(path)


def _read(out: Any) -> list[torch.Tensor]:
    """What a vision model returns that has no token axis, or is what it says of all tokens."""
    return [out.logits] if hasattr(out, "logits") else [out.last_hidden_state, out.pooler_output]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", fleet.TOWERS)
def test_a_tower_equals_the_run_by_hand(name: str, dtype: torch.dtype, attention: str, rule: str) -> None:
    model = fleet.shared(name, dtype, attention)
    inputs = fleet.example(model, 3)
    out, kept = naive.encode(model, inputs["pixel_values"], [naive.longest(1, 6)])
    pruned = prune(model, rule=rule)
    for got, expected in zip(_read(pruned(**inputs)), _read(out), strict=True):
        assert difference(got, expected) == 0
    assert pruned.kept == kept and all(row[0] == 0 for row in kept[0])


@pytest.mark.parametrize("name", fleet.TOWERS)
def test_two_drops_in_a_tower_never_choose_the_class_token(name: str, rule: str) -> None:
    """The second chooses from what the first left, where the class token is the first of an ordinary sequence."""
    model = fleet.shared(name)
    inputs = fleet.example(model, 3)
    out, kept = naive.encode(model, inputs["pixel_values"], [naive.longest(1, 9), naive.longest(2, 4)])
    pruned = prune(model, rules=[{"rule": rule, "keep": 9}, {"rule": rule, "keep": 4, "layer": 2}])
    for got, expected in zip(_read(pruned(**inputs)), _read(out), strict=True):
        assert difference(got, expected) == 0
    assert pruned.kept == kept and all(len(row) == 5 and row[0] == 0 for row in kept[1])


@pytest.mark.parametrize("name", fleet.TOWERS)
def test_keeping_every_patch_keeps_every_bit(name: str, rule: str) -> None:
    model = fleet.shared(name)
    inputs = fleet.example(model, 3)
    with torch.no_grad():
        expected = _read(model(**inputs))
    for got, one in zip(_read(prune(model, rule=rule, keep=1.0)(**inputs)), expected, strict=True):
        assert difference(got, one) == 0


@pytest.mark.parametrize("name", ["llava", "llava-siglip-qwen2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_drop_in_the_tower_shortens_the_text_sequence(name: str, batch: int, rule: str) -> None:
    model = fleet.shared(name)
    inputs = fleet.example(model, batch, (2, 0, 1)[:batch])
    ran = naive.run(model, inputs, tower=naive.longest(1, 6))
    pruned = prune(model, rule=rule)
    assert difference(pruned(**inputs).logits, ran.logits) == 0
    assert pruned.kept == ran.kept


@pytest.mark.parametrize("then", ["random", "fastv"])
def test_a_drop_in_the_tower_composes_with_one_in_the_decoder(then: str, rule: str) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, (2, 0, 1))
    cut = naive.random(3) if then == "random" else naive.fastv(2, 3)
    ran = naive.run(model, inputs, [cut], tower=naive.longest(1, 9))
    pruned = prune(model, rules=[{"rule": rule, "keep": 9}, {"rule": then, "keep": 3}])
    assert difference(pruned(**inputs).logits, ran.logits) == 0
    assert pruned.kept == ran.kept


def test_the_last_vision_scores_choose_among_what_a_drop_in_the_tower_left(rule: str, tmp_path: Path) -> None:
    """The scores stand on the class token's sequence as the drop left it, the features on its patches alone."""
    path = tmp_path / "late.yaml"
    path.write_text("""
rule: late
about: Keep the patches that the last used layer attends to.
params:
  keep: {type: ratio_or_count, default: 4, about: tokens kept}
steps:
  - score: {name: deep, by: attention_received, at: vision.features.attention, queries: all, heads: mean}
  - select: {name: kept, by: topk, scores: deep, keep: "${keep}", among: image}
  - drop: {at: projector.input, keep: kept, positions: compact}
""")
    model, written = fleet.shared("llava"), fleet.shared("llava", attention="eager")
    inputs = fleet.example(model, 3, (2, 0, 1))

    def deep(*_: Any) -> naive.Kept:
        with naive.cut_in_tower(written, naive.longest(1, 9)):
            weights = written.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2]
        return [[i - 1 for i in naive.best(row, range(1, 10), 4)] for row in weights.mean((1, 2))]

    ran = naive.run(model, inputs, tower=naive.longest(1, 9), patches=deep)
    pruned = prune(model, rules=[{"rule": rule, "keep": 9}, str(path)])
    assert difference(pruned(**inputs).logits, ran.logits) == 0
    assert sorted(pruned.kept) == sorted(ran.kept)  # the graph chooses patches before either cut of the text


def test_the_grid_is_gone_after_a_drop_in_the_tower(rule: str) -> None:
    model = fleet.shared("llava")
    later = {"rule": "hiprune", "keep": 5, "alpha": 1.0, "object_layer": 2}
    pruned = prune(model, rules=[{"rule": rule, "keep": 9}, later])
    with pytest.raises(Exception, match="grid") as caught:
        pruned(**fleet.example(model))
    assert isinstance(refusal(caught.value), tokcompile.TokredError)


@pytest.mark.parametrize("rule_name", ["fastv", "random"])
@pytest.mark.parametrize("name", fleet.TOWERS)
def test_a_rule_for_a_decoder_is_refused(name: str, rule_name: str) -> None:
    model = fleet.shared(name)
    with pytest.raises(Exception, match="no decoder stack") as caught:
        prune(model, rule=rule_name)(**fleet.example(model))
    assert type(refusal(caught.value)) is tokcompile.AddressError
