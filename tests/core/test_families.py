"""Every family of the catalogue: its stacks, its own bits when all is kept, and its runs on fewer tokens by hand.

A cell that cannot be done soundly is refused, with the reason that stands here.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import byhand
import families
import pytest
import torch
import towers
import unloaded
from harness import prune, refusal

import tokcompile
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = "takes the token axis apart"
REFUSED = {
    ("dit", "vision"): GRID,  # latents are put together from every patch
    ("swin", "vision"): GRID,  # windows
    ("timm_swin", "vision"): "a score needs a value",  # windows, and rows and columns are two dimensions
    ("mllama", "vision"): GRID,  # tiles of one picture
    ("llava_next", "vision"): GRID,  # crops are put together on one grid, of which a margin is cut off
    ("llava_onevision", "vision"): GRID,  # and that is resampled
    ("molmo2", "vision"): "picks tokens by their number",  # the caller says which patches make a feature
}
UNSCORED = {("timm_swin", "vision")}
"""Stacks whose tokens no rule can choose from, so that none can keep them all."""
FEATURES_AT = {
    **dict.fromkeys(("llava_next", "llava_onevision", "molmo2"), ("splice.input", "row")),
    "mllama": ("projector.output", "image"),
}
"""Features that are put together, or picked, behind the projector, or read by the text's attention: where they are."""
TOWER_DIFFERS = {("gemma3", "vision"): 2e-5}  # patches are averaged across memory, whose steps are shorter
STACKS: dict[str, dict[str, int]] = {
    "bert": {"encoder": 4},
    "roberta": {"encoder": 4},
    "modernbert": {"encoder": 4},
    "t5": {"encoder": 3, "decoder": 3},
    "bart": {"encoder": 3, "decoder": 3},
    "whisper": {"encoder": 3, "decoder": 3},
    "swin": {"vision": 2, "vision2": 2},
    "timm_swin": {"vision": 2, "vision2": 2},
    **{name: {"vision": 3, "decoder": 4} for name in ("llava", "llava_next", "mllama", "molmo2", "qwen3_vl")},
    **{
        name: {"vision": 2, "decoder": 4}
        for name in (
            *("internvl", "smolvlm", "idefics3", "paligemma", "gemma3"),
            *("llava_onevision", "mistral3", "qwen2_vl", "qwen2_5_vl"),
        )
    },
}
EXPORT_DIFFERS = {"beit": 1e-5}  # torch.export's own program is not eager's to the last bit
ALL = catalogue.families()
CAPTURED = list(ALL)


# What `make test` runs; `make coverage` and `make test-slow` run all.
USUAL = {
    *("mixtral", "gpt2", "gpt_oss", "deepseek_v3", "paligemma", "qwen3_vl"),
    *("bert", "t5", "siglip_vision", "beit", "swin"),
    *("timm_vit", "timm_vit_written", "timm_siglip", "timm_deit", "timm_eva02", "timm_dinov3", "timm_swin"),
}


def _marked(cases: list[Any]) -> list[Any]:
    """Cases of families that are not among the usual are slow."""
    out = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if values[0] in USUAL else (pytest.mark.slow,)
        out.append(pytest.param(*values, marks=marks, id="-".join(values)))
    return out


@cache
def subject(name: str) -> families.Subject:
    if why := unloaded.missing(ALL[name].needs):
        pytest.skip(why)
    return families.subject(ALL[name])


@cache
def exported(name: str) -> torch.export.ExportedProgram:
    return families.exported(subject(name))


@cache
def compiled(name: str, stack: str) -> tuple[list[torch.Tensor], list[byhand.Kept]]:
    """What the compiled model says under a drop, and the tokens kept: where text follows a tower, of both."""
    with TemporaryDirectory() as folder:
        return families.dropped(subject(name), stack, Path(folder), keep=7)


@cache
def by_hand(name: str, stack: str) -> list[torch.Tensor]:
    it, (_, kept) = subject(name), compiled(name, stack)
    if len(kept) == 1:
        return families.hand_run(it, stack, kept[0])
    with towers.shortened(it, kept[0]):
        return families.hand_run(it, "decoder", kept[1], block=0)


def stacks(name: str) -> dict[str, int]:
    kind = ALL[name].kind
    return STACKS.get(name, {"decoder" if kind == "decoder" else "vision": 4})


def _heads(it: families.Subject) -> set[int]:
    """The numbers of attention heads that a model's configuration, or one within it, names."""
    found: set[int] = set()
    config = getattr(it.model, "config", None)
    todo = [it.family.config if config is None else config.to_dict()]
    while todo:
        for key, value in todo.pop().items():
            if isinstance(value, dict):
                todo.append(value)
            elif re.fullmatch(r"(.*_)?(num_attention_heads|num_heads|attention_heads|n_head)", str(key)):
                found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return found


def cells(*without: str) -> list[Any]:
    return [(name, stack) for name in CAPTURED for stack in stacks(name) if stack not in without]


@pytest.mark.parametrize("name", _marked(CAPTURED))
def test_stacks_are_complete(name: str) -> None:
    """As many blocks as the configuration has layers; each attention belongs to one, but for a pooling head."""
    sites = subject(name).sites
    assert {stack: len(found.blocks) for stack, found in sites.stacks.items()} == stacks(name)
    strung = sum(1 + len(block.cross) for found in sites.stacks.values() for block in found.blocks)
    assert len(sites.attentions) - strung == len(sites.loose) <= 1
    heads = {block.attention.query.meta["val"].shape[1] for found in sites.stacks.values() for block in found.blocks}
    assert heads and heads <= _heads(subject(name))
    assert not subject(name).program.axes.context.conflicts or name == "molmo2"


@pytest.mark.parametrize("name", _marked(CAPTURED))
def test_keeping_everything_keeps_every_bit(name: str, tmp_path: Path) -> None:
    it = subject(name)
    with torch.no_grad():
        expected = families.outputs(it.model(**it.inputs))
    tried = [stack for stack in stacks(name) if stack != "vision2" and (name, stack) not in UNSCORED]
    if not tried:
        pytest.skip("no tokens to choose from")
    for stack in tried:
        path = families.rule(tmp_path, "group", stack)
        torch._dynamo.reset()
        pruned = prune(it.model, rule=path, keep=1.0, **families.group_of(it, stack))
        got = families.outputs(pruned(**it.inputs))
        assert families.compared(got, expected) == 0 or families.compared(got, families.traced(it)) == 0


@pytest.mark.parametrize(("name", "stack"), _marked(cells("vision2")))
def test_a_drop_equals_the_run_by_hand_or_is_refused(name: str, stack: str, tmp_path: Path) -> None:
    it = subject(name)
    if (name, stack) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, stack]) as caught:
            families.dropped(it, stack, tmp_path, keep=7)
        assert refusal(caught.value).where
        return
    got, kept = compiled(name, stack)
    difference = families.compared(got, by_hand(name, stack))
    assert difference <= TOWER_DIFFERS.get((name, stack), 0) or difference <= 4 * _tracing_differs(it)
    _chosen_by_luck(it, stack, kept)
    front = getattr(it.model, "num_prefix_tokens", None)
    if front is not None:  # class and register tokens are no image tokens
        assert all(row[:front] == list(range(front)) and len(row) == front + 7 for row in kept[0])


def _tracing_differs(it: families.Subject) -> float:
    """How far a model without a rule is from itself when it is traced: some last bits, with older transformers."""
    with torch.no_grad():
        return families.compared(families.traced(it), families.outputs(it.model(**it.inputs)))


def _chosen_by_luck(it: families.Subject, stack: str, kept: list[byhand.Kept]) -> None:
    """The tokens themselves: those that the rule's hash says, padding last."""
    if len(kept) == 2:  # of each feature, its patches' mean
        assert kept[0] == towers.lucky(it, 7)
        return
    if stack == "vision" or it.sites.paddings.get(stack) is None:
        return
    name = "decoder_attention_mask" if (it.family.kind, stack) == ("encoder-decoder", "decoder") else "attention_mask"
    valid = it.inputs[name].bool()
    images = families.among(it, stack) == "image"
    group = it.inputs["input_ids"] == it.model.config.image_token_id if images else torch.ones_like(valid)
    assert kept[0] == families.kept_by_luck(valid, group, 7, ends=stack == "decoder" and not images)


@cache
def fewer_features(name: str) -> tuple[list[torch.Tensor], byhand.Kept]:
    """What the compiled model says on some features of its images, and the tokens kept, of text where it has any."""
    at, per = FEATURES_AT.get(name, ("projector.input", "image"))
    torch._dynamo.reset()
    with TemporaryDirectory() as folder:
        pruned = prune(subject(name).model, rule=families.rule(Path(folder), "features", at), keep=7, per=per)
        return families.outputs(pruned(**subject(name).inputs)), pruned.kept[-1]


@cache
def fewer_features_by_hand(name: str) -> list[torch.Tensor]:
    it, (_, kept) = subject(name), fewer_features(name)
    read = it.sites.splice is None  # by the text's attention, with no tokens of its own for them
    return towers.read(it, kept) if read else families.hand_run(it, "decoder", kept, block=0)


VLMS = _marked([name for name in CAPTURED if ALL[name].kind == "vlm"])


@pytest.mark.parametrize("name", VLMS)
def test_dropping_features_is_dropping_their_tokens(name: str) -> None:
    assert families.compared(fewer_features(name)[0], fewer_features_by_hand(name)) == 0


@pytest.mark.parametrize("name", VLMS)
def test_dropping_features_of_an_exported_program(name: str, tmp_path: Path) -> None:
    at, per = FEATURES_AT.get(name, ("projector.input", "image"))
    program = tokcompile.rewrite(exported(name), families.rule(tmp_path, "features", at), keep=7, per=per)
    assert families.compared(families.ran(program, subject(name)), fewer_features_by_hand(name)) == 0


@pytest.mark.parametrize(("name", "stack"), _marked(cells("vision2")))
def test_an_exported_program_keeps_its_bits_and_drops_or_is_refused(name: str, stack: str, tmp_path: Path) -> None:
    it, program = subject(name), exported(name)
    if (name, stack) in REFUSED:
        with pytest.raises(tokcompile.TokredError, match=REFUSED[name, stack]) as caught:
            tokcompile.rewrite(program, **families.options_for(it, stack, tmp_path, keep=7))
        assert caught.value.where
        return
    path = families.rule(tmp_path, "group", stack)
    everything = tokcompile.rewrite(program, path, keep=1.0, **families.group_of(it, stack))
    assert families.compared(families.ran(everything, it), families.ran(program, it)) == 0
    rewritten = tokcompile.rewrite(program, **families.options_for(it, stack, tmp_path, keep=7))
    worst = TOWER_DIFFERS.get((name, stack), EXPORT_DIFFERS.get(name, 0))
    assert families.compared(families.ran(rewritten, it), by_hand(name, stack)) <= worst
