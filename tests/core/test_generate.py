"""`model.generate` after a prompt was pruned: each step equals a run by hand that has no cache to go wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import fleet
import naive
import pytest
import torch
import transformers
from harness import difference, greedy, refusal
from packaging.version import Version
from torch import Tensor, nn

import tokcompile
from tokcompile.models import catalogue

STEPS = 5
GREEDY = greedy(STEPS)
PADS = {1: (), 3: (2, 0, 1)}
AT_A_LAYER = """
rule: mine
about: Drop random tokens before the last block.
params:
  keep: {type: ratio_or_count, default: 6, about: tokens kept}
  seed: {type: int, default: 3, min: 0, about: of the random scores}
  positions: {type: choice, default: keep, choices: [keep, compact], about: what becomes of rotary positions}
steps:
  - score: {name: luck, by: random, at: decoder.2.input, seed: "${seed}"}
  - select: {name: kept, by: topk, scores: luck, among: image, keep: "${keep}"}
  - drop: {at: decoder.2.input, keep: kept, positions: "${positions}"}
"""


ENDS = """
rule: ends
about: Keep the first token, the last one, which the head reads, and random others.
params:
  keep: {type: ratio_or_count, default: 6, about: tokens kept}
steps:
  - score: {name: luck, by: random, at: decoder.0.input}
  - select: {name: ends, by: protect, protect: [first, last]}
  - select: {name: kept, by: fill, first: [ends], scores: luck, among: all, keep: "${keep}"}
  - drop: {at: decoder.0.input, keep: kept, positions: compact}
"""


def at_a_layer(keep: int, compact: bool) -> naive.Cut:
    """The rule above, by hand."""
    return replace(naive.random(keep, seed=3), layer=2, compact=compact)


Case = tuple[list[dict[str, Any]], dict[str, Any]]
HIPRUNE = {"rule": "hiprune", "keep": 10, "alpha": 1.0}
CASES: dict[str, Case] = {
    "fastv": ([{"rule": "fastv", "keep": 5}], {"cuts": [naive.fastv(2, 5)]}),
    "hiprune": ([HIPRUNE], {"patches": naive.hiprune(10, 1.0)}),
    "random": ([{"rule": "random", "keep": 5}], {"cuts": [naive.random(5)]}),
    "kept-at-a-layer": ([{"rule": "mine", "keep": 6}], {"cuts": [at_a_layer(6, False)]}),
    "compact-at-a-layer": ([{"rule": "mine", "keep": 6, "positions": "compact"}], {"cuts": [at_a_layer(6, True)]}),
    "hiprune-then-fastv": (
        [HIPRUNE, {"rule": "fastv", "keep": 4}],
        {"cuts": [naive.fastv(2, 4)], "patches": naive.hiprune(10, 1.0)},
    ),
    "random-then-compact": (
        [{"rule": "random", "keep": 8}, {"rule": "mine", "keep": 5, "positions": "compact"}],
        {"cuts": [naive.random(8), at_a_layer(5, True)]},
    ),
}


def _rules(folder: Path, case: str) -> list[dict[str, Any]]:
    path = folder / "mine.yaml"
    path.write_text(AT_A_LAYER)
    return [rule | {"rule": str(path)} if rule["rule"] == "mine" else rule for rule in CASES[case][0]]


def _generated(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    out = model.generate(**inputs, **GREEDY)
    return torch.stack(out.logits, 1), out.past_key_values


@pytest.mark.parametrize("batch", PADS, ids=["one-row", "left-padded"])
@pytest.mark.parametrize("case", CASES)
def test_generate_equals_a_run_by_hand(case: str, batch: int, tmp_path: Path) -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, batch, PADS[batch])
    expected = naive.generate(model, inputs, STEPS, **CASES[case][1])
    tokcompile.compile(model, rules=_rules(tmp_path, case), target="eager")
    logits, cache = _generated(model, inputs)
    assert difference(logits, expected) <= 1e-4
    ran = naive.run(model, inputs, **CASES[case][1])
    assert [layer.keys.shape[2] for layer in cache.layers] == [n + STEPS - 1 for n in ran.lengths]


@pytest.mark.parametrize("plain", [False, True], ids=["compile", "model.compile"])
@pytest.mark.parametrize("keep", [6, 12], ids=["no-padding-left", "some-padding-left"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_padding_that_was_dropped_is_not_masked_later(name: str, keep: int, plain: bool, tmp_path: Path) -> None:
    """Of 13 tokens, 2, 0 and 1 are padding: a choice among all drops these before any real token."""
    path = tmp_path / "ends.yaml"
    path.write_text(ENDS)
    model = fleet.build(name)
    inputs = fleet.example(model, 3, PADS[3], text=12)
    expected = naive.generate(model, inputs, STEPS, [naive.random(keep, among="all", ends=True)])
    if plain:
        model.compile(backend="tokred", options={"rule": str(path), "keep": keep, "target": "eager"})
    else:
        tokcompile.compile(model, rule=path, keep=keep, target="eager")
    assert difference(_generated(model, inputs)[0], expected) <= 1e-4


def test_rules_of_which_one_alone_takes_padding_do_not_continue(tmp_path: Path) -> None:
    path = tmp_path / "ends.yaml"
    path.write_text(ENDS)
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS[3])
    tokcompile.compile(model, rules=["random", {"rule": str(path), "keep": 8}], target="eager")
    with pytest.raises(Exception, match="one drop took padding") as caught:
        model.generate(**inputs, **GREEDY)
    assert "ends.yaml:10" in str(refusal(caught.value))


def test_a_model_without_a_class_token_generates_as_by_hand() -> None:
    model = fleet.build("llava-siglip-qwen2")
    inputs = fleet.example(model, 3, PADS[3])
    expected = naive.generate(model, inputs, STEPS, [naive.random(6)])
    tokcompile.compile(model, rule="random", keep=6, target="eager")
    assert difference(_generated(model, inputs)[0], expected) <= 1e-4


def test_a_prompt_whose_last_token_is_dropped_fails_when_run() -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=12)
    tokcompile.compile(model, rule="random", keep=3, among="all", target="eager")
    with pytest.raises(RuntimeError, match="read by its place.*by: protect"):
        model.generate(**inputs, **GREEDY)


# Older transformers makes a mask even when no token is padding, and then one mask has to fit every layer.
NO_MASK = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="a mask without padding")


@pytest.mark.parametrize(("case", "batch"), [("hiprune", 3), ("random", 3), pytest.param("fastv", 1, marks=NO_MASK)])
def test_a_plain_compiled_model_generates_as_by_hand(case: str, batch: int) -> None:
    """`model.compile(backend="tokred")` alone, where one mask fits every layer."""
    model = fleet.build("llava")
    inputs = fleet.example(model, batch, PADS[batch])
    expected = naive.generate(model, inputs, STEPS, **CASES[case][1])
    model.compile(backend="tokred", options={"rules": CASES[case][0], "target": "eager"})
    assert difference(_generated(model, inputs)[0], expected) <= 1e-4


@pytest.mark.slow
def test_generate_on_inductor_equals_a_run_by_hand() -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS[3])
    expected = naive.generate(model, inputs, STEPS, **CASES["fastv"][1])
    tokcompile.compile(model, rules=CASES["fastv"][0])
    assert difference(_generated(model, inputs)[0], expected) <= 1e-4


def test_a_second_prompt_is_pruned_by_its_own_scores() -> None:
    model = fleet.build("llava")
    prompts = [fleet.example(model, 3, PADS[3], seed=seed) for seed in (0, 1)]
    expected = [naive.generate(model, inputs, STEPS, **CASES["fastv"][1]) for inputs in prompts]
    tokcompile.compile(model, rules=CASES["fastv"][0], target="eager")
    for inputs, logits in zip(prompts, expected, strict=True):
        assert difference(_generated(model, inputs)[0], logits) <= 1e-4


def test_a_restored_model_generates_as_before() -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS[3])
    attention = model.config.get_text_config()._attn_implementation
    before = _generated(model, inputs)[0]
    tokcompile.compile(model, rules=CASES["fastv"][0], target="eager")
    assert not torch.equal(_generated(model, inputs)[0], before)
    tokcompile.restore(model)
    assert torch.equal(_generated(model, inputs)[0], before)
    assert model.config.get_text_config()._attn_implementation == attention


def test_a_bias_that_attention_is_given_is_not_lost(tmp_path: Path) -> None:
    """T5's attention adds one by distance; its decoder's mask is the caller's, of two dimensions."""
    family = catalogue.family("t5")
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    with torch.no_grad():
        expected = model(**inputs).logits
        tokcompile.compile(model, target="eager", rule=families.rule(tmp_path, "group", "decoder"), keep=1.0)
        assert difference(model(**inputs).logits, expected) <= 1e-5
