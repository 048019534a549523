"""Rules one after the other: a drop or a merge, then other positions or rotations, then a drop, as by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from fractions import Fraction
from pathlib import Path
from typing import Any

import families
import fleet
import merging_naive
import naive
import pytest
import torch
from harness import difference, prune, refusal
from rulecases import CASES as CASES_OF_RULES
from rulecases import RULES, aot, carope, tome
from torch import Tensor, nn
from turned import at, content, text_of, turned, variable

import tokcompile

PADS = (2, 0, 1)
LAST = {"rule": "fastv", "layer": 2, "keep": 3}
CUTS = [naive.fastv(2, 3)]
Run = Callable[[nn.Module, dict[str, Tensor], Sequence[naive.Cut]], naive.Ran]

# What drops or merges image tokens first, and the same by hand; each numbers the text anew.
FIRST: dict[str, tuple[dict[str, Any], Run]] = {
    "random": (
        {"keep": 8, "seed": 3},
        lambda model, inputs, cuts: naive.run(model, inputs, [naive.random(8, seed=3), *cuts]),
    ),
    "hiprune": (
        {"keep": 10, "alpha": 1.0},
        lambda model, inputs, cuts: naive.run(model, inputs, cuts, naive.hiprune(10, 1.0)),
    ),
    "tome": (
        {"pairs": 2, "positions": "compact"},
        lambda model, inputs, cuts: tome.run(model, inputs, 5, cuts),
    ),
    "tokenflex": (
        {"n": 3},
        lambda model, inputs, cuts: merging_naive.run(model, inputs, merging_naive.pooled(3), cuts),
    ),
    "vqtoken": (
        {"codes": 7},
        lambda model, inputs, cuts: merging_naive.run(model, inputs, merging_naive.coded(7, 10), cuts),
    ),
    "visionzip": (
        {"dominant": 6, "contextual": 3},
        lambda model, inputs, cuts: merging_naive.run(model, inputs, merging_naive.zipped(6, 3), cuts),
    ),
    "aot": (
        {"keep": 8, "windows": 2},
        lambda model, inputs, cuts: aot.run(model, inputs, 8, cuts=cuts),
    ),
}


def _options(first: str, model: nn.Module) -> dict[str, Any]:
    more = {"queries": "cls" if naive.class_tokens(model) else "all"} if first == "visionzip" else {}
    return {"rule": first, **FIRST[first][0], **more}


class Stretched:
    """Frequencies three times as slow, by transformers' own tables."""

    def __init__(self, model: nn.Module) -> None:
        self.text = text_of(model)
        config = deepcopy(model.config.get_text_config())
        config.rope_parameters = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
        self.tables = type(self.text.rotary_emb)(config)

    def __enter__(self) -> None:
        self.own, self.text.rotary_emb = self.text.rotary_emb, self.tables

    def __exit__(self, *error: object) -> None:
        self.text.rotary_emb = self.own


def _stretched(model: nn.Module, left: list[list[bool]], valid: Tensor) -> AbstractContextManager[None]:
    del left, valid
    return Stretched(model)


def _variable(model: nn.Module, left: list[list[bool]], valid: Tensor) -> AbstractContextManager[None]:
    del valid
    return turned(model, at(variable(left, [Fraction("1/4")])))


def _content(model: nn.Module, left: list[list[bool]], valid: Tensor) -> AbstractContextManager[None]:
    del left
    phases = content(*carope.parameters(model, "1/3"), valid)

    def angles(x: Tensor, position_ids: Tensor, inverse: Tensor) -> Tensor:
        if x.shape[1] == valid.shape[1]:
            return phases(x, position_ids, inverse)
        return torch.zeros(1, 1, x.shape[1], len(inverse))  # of all tokens, which are gone before any layer turns them

    return turned(model, angles)


# What becomes of positions next, and the same by hand, given the image tokens and the real tokens that are left.
THEN: dict[str, tuple[Callable[[nn.Module], dict[str, Any]], Any, float]] = {
    "rope_scaling": (lambda model: {"scaling": "linear", "factor": 3.0}, _stretched, 1e-5),
    "v2pe": (lambda model: {"delta": "1/4"}, _variable, 2e-5),
    "carope": (lambda model: carope.CASE.options(model, "1/3"), _content, 5e-5),
}


def _left(inputs: dict[str, Tensor], ran: naive.Ran) -> tuple[list[list[bool]], Tensor]:
    """Which of the tokens that the decoder's first layer sees are of an image, and which are real."""
    image = (inputs["input_ids"] == fleet.IMAGE).tolist()
    gone = len(image[0]) - ran.lengths[0]
    rows, valid = [], []
    for row, real in zip(image, inputs["attention_mask"].tolist(), strict=True):
        first = row.index(True)
        rows.append(row[:first] + row[first + gone :])
        valid.append(real[:first] + real[first + gone :])
    return rows, torch.tensor(valid).bool()


CASES = [
    *(("llava", first, then) for first in FIRST for then in THEN),
    *(("llava-siglip-qwen2", first, "rope_scaling") for first in FIRST),
    *(("llava-siglip-qwen2", first, then) for first in ("hiprune", "tome") for then in ("v2pe", "carope")),
    *(("llava-last", first, then) for first in ("random", "tome") for then in THEN),
]


@pytest.mark.parametrize(("name", "first", "then"), CASES)
def test_three_rules_are_one_after_the_other_by_hand(name: str, first: str, then: str) -> None:
    model = fleet.shared(name)
    inputs = fleet.example(model, 3, PADS)
    options, by_hand, tolerance = THEN[then]
    options = options(model)
    extra = {"weights": options.pop("weights")} if "weights" in options else {}
    pruned = prune(model, rules=[_options(first, model), {"rule": then, **options}, LAST], **extra)
    out = pruned(**inputs)
    run = FIRST[first][1]
    left, valid = _left(inputs, run(model, inputs, []))
    with by_hand(model, left, valid):
        ran = run(model, inputs, CUTS)
    assert pruned.kept == ran.kept
    assert difference(out.logits, ran.logits) <= tolerance
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == ran.lengths


REFUSED = {
    "fractions, then numbered anew": (
        ["v2pe", {"rule": "random", "keep": 8}],
        "positions cannot be compacted",
    ),
    "words of positions, then numbered anew": (
        [{"rule": "seqpe", "length": 64}, {"rule": "random", "keep": 8}],
        "compact",
    ),
    "two marks": (
        [{"rule": "pospad", "keep": 8}, {"rule": "pospad", "keep": 4}],
        "mark",
    ),
    "tokens of a grid that a drop took apart": (
        [{"rule": "hiprune", "keep": 8}, {"rule": "tokenflex", "n": 2}],
        "grid",
    ),
    "fractions, then words of positions": (
        ["v2pe", {"rule": "seqpe", "length": 64}],
        "positions are fractions",
    ),
    "fractions of fractions": (
        [{"rule": "v2pe", "delta": "1/2"}, {"rule": "v2pe", "delta": "1/4"}],
        "positions are fractions",
    ),
    "markers, then fewer features": (
        [{"rule": "pospad", "keep": 8}, {"rule": "hiprune", "keep": 10}],
        "behind the place of this one",
    ),
    "inserted tokens, then fewer features": (
        [{"rule": "meta_tokens", "layers": 0}, {"rule": "vqtoken", "codes": 7}],
        "behind the place of this one",
    ),
    "two rotations": (
        ["carope", {"rule": "rope_scaling", "factor": 2.0}],
        "no rotary tables that are computed from positions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_pairs_that_do_not_compose_are_refused_with_both_names(case: str) -> None:
    rules, reason = REFUSED[case]
    model = fleet.shared("llava")
    with pytest.raises(Exception, match=reason) as caught:
        prune(model, rules=rules)(**fleet.example(model, 2))
    error = refusal(caught.value)
    names = [rule if isinstance(rule, str) else rule["rule"] for rule in rules]
    assert all(name in str(error) for name in names)


@pytest.mark.parametrize("order", ["drop-first", "phases-first"])
def test_phases_have_no_part_of_features_that_were_dropped_before_the_text(order: str, tmp_path: Path) -> None:
    """The text's positions stay, which phases do not go by: they are those of the tokens that are left."""
    model, given = fleet.shared("llava"), fleet.example(fleet.shared("llava"), 2, (2, 0))
    drop = {"rule": families.rule(tmp_path, "features", "projector.output"), "keep": 6}
    phases = _of_library("carope", model)
    weights = phases.pop("weights")
    rules = [drop, phases] if order == "drop-first" else [phases, drop]
    pruned = prune(model, rules=rules, weights=weights)
    logits = pruned(**given).logits
    rows = torch.tensor(pruned.kept[-1])
    mask, ids = given["attention_mask"].gather(1, rows), given["input_ids"].gather(1, rows)
    with torch.no_grad():
        features = model.model.multi_modal_projector(naive.vision_features(model, given["pixel_values"]))
        features = torch.stack([f[k] for f, k in zip(features, torch.tensor(pruned.kept[0]), strict=True)])
        stream = model.get_input_embeddings()(ids).masked_scatter((ids == fleet.IMAGE)[..., None], features)
        with turned(model, content(*carope.parameters(model, "1/3"), mask.bool())):
            hidden = text_of(model)(inputs_embeds=stream, attention_mask=mask, use_cache=False).last_hidden_state
        expected = model.lm_head(hidden)
    assert difference(logits[mask.bool()], expected[mask.bool()]) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("first", RULES)
def test_every_pair_of_the_library_runs_or_is_refused_by_both_names(first: str) -> None:
    """No pair fails in any other way: not in PyTorch, and not in a graph that the verifier stops."""
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS)
    for second in RULES:
        options = [_of_library(rule, model) for rule in (first, second)]
        weights = [each.pop("weights") for each in options if "weights" in each]
        extra = {"weights": _joined(weights)} if weights else {}
        try:
            logits = prune(model, rules=options, **extra)(**inputs).logits
        except Exception as error:
            said = str(refusal(error))
            assert first in said and "does not run" not in said, said
        else:
            assert logits[:, -1].isfinite().all(), second
        torch._dynamo.reset()


def _of_library(rule: str, model: nn.Module) -> dict[str, Any]:
    case = CASES_OF_RULES[rule]
    return {"rule": rule, **(case.options(model, "1/3") if "llava" in case.models else {})}


def _joined(weights: Sequence[tokcompile.Weights]) -> tokcompile.Weights:
    whole = tokcompile.Weights()
    for each in weights:
        whole.load_state_dict({**whole.state_dict(), **each.state_dict()})
    return whole
