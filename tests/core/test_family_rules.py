"""Every rule of the library on every vision-language family: the tokens that transformers' own weights choose.

An oracle chooses them from attention weights that the same model returns when its attention is written out; the run by
hand on these tokens then says the same as the compiled model, to the last bit. A cell that cannot be done soundly is
refused, with the reason that stands here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import byhand
import families
import naive
import pytest
import torch
import towers
import unloaded
from core.test_family_generate import LENGTH
from core.test_family_generate import by_hand as steps_by_hand
from harness import Pruned, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile import TokredError
from tokcompile.models import catalogue
from tokcompile.pipeline import facts
from tokcompile.rulefile import LIBRARY, rule_names

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = catalogue.families()
VLMS = [name for name, family in ALL.items() if family.kind == "vlm"]
CROSS = "no image tokens"
GRID = "takes the token axis apart"
NO_GRID = "neighbours need the patch grid"
REFUSED = {
    ("llava_next", "hiprune"): GRID,  # crops are put together on one grid, of which a margin is cut off
    ("llava_onevision", "hiprune"): GRID,  # and that is resampled
    ("mllama", "fastv"): CROSS,  # text attends to patches, which are no tokens of its own
    ("mllama", "random"): CROSS,
    ("mllama", "divprune"): CROSS,
    ("mllama", "hiprune"): NO_GRID,  # tiles of one picture
    ("molmo2", "hiprune"): NO_GRID,  # attention pools patches
}
COORDINATES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Positions in time, height and width are kept: they cannot be numbered anew."""
OPTIONS: dict[str, dict[str, Any]] = {
    "fastv": {"keep": 7},
    "hiprune": {"keep": 11, "alpha": 1.0, "object_layer": 1},  # two anchors
    "random": {"keep": 7},
    "divprune": {"keep": 7},
}
assert set(OPTIONS) <= set(rule_names())  # merges and marks have tests of their own, test_pairs and test_mark_families

# What `make test` runs; `make coverage` and `make test-slow` run all.
USUAL = {
    *(("paligemma", rule) for rule in OPTIONS),
    *(("qwen2_5_vl", rule) for rule in OPTIONS),
    ("llava_next", "hiprune"),
}


def _cells(*, exact: bool = False) -> list[Any]:
    cells = [(name, rule) for name in VLMS for rule in OPTIONS if not (exact and (name, rule) in REFUSED)]
    marks = {cell: () if cell in USUAL else (pytest.mark.slow,) for cell in cells}
    return [pytest.param(*cell, marks=marks[cell], id="-".join(cell)) for cell in cells]


@cache
def subject(name: str, images: int = 1) -> families.Subject:
    if why := unloaded.missing(ALL[name].needs):
        pytest.skip(why)
    return families.subject(ALL[name], images=images)


@cache
def exported(name: str) -> torch.export.ExportedProgram:
    return families.exported(subject(name))


def options(name: str, rule: str) -> dict[str, Any]:
    positions = {"positions": "keep"} if rule != "fastv" and name in COORDINATES else {}
    return {"rule": rule, **OPTIONS[rule], **positions}


def run(it: families.Subject | Called, **given: Any) -> tuple[list[Tensor], Pruned]:
    """Compiled: what the model says."""
    torch._dynamo.reset()
    pruned = prune(it.model, **given)
    return families.outputs(pruned(**it.inputs)), pruned


class Called(NamedTuple):
    """What `run` needs of a subject."""

    model: nn.Module
    inputs: dict[str, Any]


# The oracles.


@cache
def written_out(name: str) -> nn.Module:
    """The model with written-out attention, which returns its weights."""
    model = ALL[name].build()
    model.set_attn_implementation("eager")
    return model


def image(it: families.Subject) -> Tensor:
    """bool [B, T]: image tokens."""
    return it.inputs["input_ids"] == it.model.config.image_token_id


@torch.no_grad()
def last_row(it: families.Subject, layer: int) -> Tensor:
    """What the last real token of each row looks at in a decoder layer, mean over heads, float32 [B, T]."""
    weights = written_out(it.family.name)(**it.inputs, output_attentions=True).attentions[layer].float()
    tokens = it.inputs["attention_mask"].shape[1]
    last = (it.inputs["attention_mask"] * torch.arange(tokens)).argmax(1)
    return weights[torch.arange(len(last)), :, last].mean(1)


@torch.no_grad()
def embedded(it: families.Subject) -> Tensor:
    """What the first decoder layer reads, [B, T, C]."""
    seen: list[Tensor] = []
    decoder = it.model.get_decoder()
    first = (decoder.layers if hasattr(decoder, "layers") else decoder.blocks)[0]
    hook = first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    it.model(**it.inputs)
    hook.remove()
    return seen[0]


def chosen(it: families.Subject, rule: str, layer: int = 2) -> list[byhand.Kept]:
    """The tokens that a rule keeps under `OPTIONS`, a list for each drop: hiprune drops patches, and text follows."""
    keep = OPTIONS[rule]["keep"]
    if rule == "fastv":
        return [naive.looked_at(last_row(it, layer - 1), image(it), keep)]
    if rule == "random":
        luck = torch.tensor([naive.lucky(image(it).shape[1], 0)] * len(image(it)))
        return [naive.looked_at(luck, image(it), keep)]
    if rule == "divprune":
        return [naive.divprune(keep).choose(naive.State(embedded(it), it.inputs["attention_mask"].bool(), image(it)))]
    feature = getattr(it.model.config, "vision_feature_layer", -1)  # of the states, the first of which precede blocks
    middle, deep = (towers.received(it, block) for block in (0, feature))
    width = towers.GRIDS[it.family.name].columns
    features = naive.anchored(middle, deep, width, keep, OPTIONS[rule]["alpha"])
    each = len(features) // len(image(it))  # images in a row
    rows = [features[start : start + each] for start in range(0, len(features), each)]
    ordinals = [[number * middle.shape[1] + f for number, one in enumerate(row) for f in one] for row in rows]
    return [features, [naive.stay(row, ordinals[b]) for b, row in enumerate(image(it).tolist())]]


def cut(options: dict[str, Any]) -> dict[str, Any]:
    """Where the text is cut under options, and whether its positions are numbered anew."""
    if options["rule"] == "fastv":
        return {"block": options.get("layer", 2), "compact": False}
    return {"block": 0, "compact": options.get("positions") != "keep"}


def by_hand(it: families.Subject, kept: list[byhand.Kept], options: dict[str, Any]) -> list[Tensor]:
    """The model on the tokens kept."""
    return families.hand_run(it, "decoder", kept[-1], **cut(options))


# The cells.


@pytest.mark.parametrize(("name", "rule"), _cells())
def test_a_rule_equals_the_run_by_hand_or_is_refused(name: str, rule: str) -> None:
    it, given = subject(name), options(name, rule)
    if (name, rule) in REFUSED:
        _refused(it, REFUSED[name, rule], **given)
        return
    got, pruned = run(it, **given)
    kept = chosen(it, rule)
    assert pruned.kept == kept
    assert families.compared(got, by_hand(it, kept, given)) == 0


@pytest.mark.parametrize(("name", "rule"), _cells(exact=True))
def test_keeping_everything_under_a_rule_keeps_every_bit(name: str, rule: str) -> None:
    it = subject(name)
    with torch.no_grad():
        expected = families.outputs(it.model(**it.inputs))
    assert families.compared(run(it, **{**options(name, rule), "keep": 1.0})[0], expected) == 0


@pytest.mark.parametrize(("name", "rule"), _cells())
def test_an_exported_program_under_a_rule_equals_the_run_by_hand_or_is_refused(name: str, rule: str) -> None:
    it, given = subject(name), options(name, rule)
    if (name, rule) in REFUSED:
        with pytest.raises(TokredError, match=REFUSED[name, rule]) as caught:
            tokcompile.rewrite(exported(name), **given)
        assert caught.value.where
        return
    got = families.ran(tokcompile.rewrite(exported(name), **given), it)
    assert families.compared(got, by_hand(it, chosen(it, rule), given)) == 0


@pytest.mark.parametrize(("name", "rule"), _cells(exact=True))
def test_generate_under_a_rule_equals_a_run_by_hand(name: str, rule: str) -> None:
    length, given = LENGTH.get(name, 17), options(name, rule)
    it = families.subject(ALL[name], length=length)
    expected = steps_by_hand(it, chosen(it, rule)[-1], **cut(given))
    prompt = it.family.example(it.model, batch=2, padded=True, length=length)
    torch._dynamo.reset()
    tokcompile.compile(it.model, target="eager", **given)
    try:
        got = torch.stack(it.model.generate(**prompt, **greedy(expected.shape[1])).logits, 1)
    finally:
        tokcompile.restore(it.model)
    assert families.compared([got], [expected]) <= 1e-4


def _refused(it: families.Subject | Called, why: str, **given: Any) -> TokredError:
    with pytest.raises(Exception, match=why) as caught:
        run(it, **given)
    error = refusal(caught.value)
    assert error.where and error.remedy
    assert any(f"{Path(given['rule']).stem}.yaml" in place for place in error.where)
    return error


# Models without images in a text.


@pytest.mark.parametrize(
    ("rule", "why"), [("fastv", "no image tokens"), ("random", "no image tokens"), ("hiprune", "no vision stack")]
)
@pytest.mark.parametrize("name", ["gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "mixtral"))])
def test_a_rule_for_image_tokens_is_refused_by_a_decoder(name: str, rule: str, why: str) -> None:
    _refused(_called(name), why, **options(name, rule))


@pytest.mark.parametrize(
    ("rule", "why"), [("fastv", "no decoder stack"), ("random", "no decoder stack"), ("hiprune", "no projector")]
)
@pytest.mark.parametrize("name", ["siglip_vision", pytest.param("dinov2_with_registers", marks=pytest.mark.slow)])
def test_a_rule_for_a_text_is_refused_by_a_tower(name: str, rule: str, why: str) -> None:
    _refused(_called(name), why, **options(name, rule))


@cache
def _called(name: str) -> Called:
    """A model that was called once, with its example; nothing is captured."""
    model = ALL[name].build()
    inputs = ALL[name].example(model, batch=2, padded=True)
    with torch.no_grad():
        model(**inputs)
    return Called(model, inputs)


# What the families share little of.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_fastv_after_the_first_layer(name: str) -> None:
    """A sliding window, out of which the last token sees no image: all are tied; and features added after the cut."""
    it, given = subject(name), {**options(name, "fastv"), "layer": 1}
    got, pruned = run(it, **given)
    kept = chosen(it, "fastv", layer=1)
    assert pruned.kept == kept
    assert families.compared(got, by_hand(it, kept, given)) == 0


def test_the_last_token_of_a_row_that_is_padded_on_the_right() -> None:
    """Its score is the last real token's, which differs from row to row."""
    it = subject("paligemma")
    padded = replace(it, inputs=_padded_on_the_right(it.inputs))
    given = options("paligemma", "fastv")
    got, pruned = run(padded, **given)
    kept = chosen(padded, "fastv")
    assert pruned.kept == kept
    assert families.compared(got, by_hand(padded, kept, given)) == 0


def _padded_on_the_right(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each row's padding moved to its end."""
    pads = (1 - inputs["attention_mask"]).sum(1).tolist()
    assert any(pads)
    return {
        key: torch.stack([row.roll(-pad, 0) for row, pad in zip(value, pads, strict=True)])
        if isinstance(value, Tensor) and value.shape == inputs["attention_mask"].shape
        else value
        for key, value in inputs.items()
    }


def test_random_tokens_of_several_images_in_a_row() -> None:
    it, given = subject("paligemma", images=2), options("paligemma", "random")
    got, pruned = run(it, **given)
    kept = chosen(it, "random")
    assert pruned.kept == kept and [len(row) for row in kept[0]] == [17 + 7] * 2
    assert families.compared(got, by_hand(it, kept, given)) == 0


def test_positions_in_height_and_width_are_not_numbered_anew() -> None:
    _refused(subject("qwen2_vl"), "several coordinates", rule="random", keep=7, positions="compact")


def test_a_budget_per_image_is_refused_where_images_share_a_sequence(tmp_path: Path) -> None:
    path = tmp_path / "random.yaml"
    path.write_text((LIBRARY / "random.yaml").read_text().replace("per: row", "per: image"))
    error = _refused(subject("qwen2_vl"), "images' own axis", rule=str(path), keep=7, positions="keep")
    assert error.found == "features of all images in one sequence"


def test_two_factors_of_a_sequence_are_no_grid() -> None:
    """Patches that are grouped by four are 36 times 4, and no picture of that height and width."""
    it = subject("qwen2_vl")
    known = facts(it.program, it.sites)
    assert known["image.tokens"] == 18 and not {"grid.height", "grid.width"} & known.keys()
    it = subject("paligemma")
    assert facts(it.program, it.sites)["grid.width"] == 5
