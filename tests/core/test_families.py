"""Every family of the catalogue: its stacks, its own bits when all is kept, and its runs on fewer tokens by hand.

A cell that cannot be done soundly is refused, with the reason that stands here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import families
import pytest
import torch
import unloaded
from harness import prune, refusal

import tokcompile
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = "takes the token axis apart"
ROWS = r"needs a value \[B, T, C\]"  # patches of all images are one sequence, without rows
REFUSED = {
    ("dit", "vision"): GRID,  # latents are put together from every patch
    ("swin", "vision"): GRID,  # windows
    ("timm_swin", "vision"): "a score needs a value",  # windows, and rows and columns are two dimensions
    ("internvl", "vision"): GRID,  # neighbouring patches become one feature
    ("gemma3", "vision"): GRID,
    ("mllama", "vision"): GRID,  # tiles of one picture
    ("smolvlm", "vision"): GRID,
    ("idefics3", "vision"): GRID,
    ("llava_next", "vision"): GRID,
    ("llava_onevision", "vision"): GRID,
    ("mistral3", "vision"): "does not run",
    ("qwen2_vl", "vision"): ROWS,
    ("qwen2_5_vl", "vision"): ROWS,
    ("qwen3_vl", "vision"): ROWS,
    ("molmo2", "vision"): "picks tokens by their number",
}
UNSCORED = {key for key, why in REFUSED.items() if why == ROWS} | {("timm_swin", "vision")}
"""Stacks whose tokens no rule can choose from, so that none can keep them all."""
FEATURES = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3"), ROWS),
    "llava_onevision": GRID,
    **dict.fromkeys(("mllama", "molmo2"), "no projector"),  # read, and pooled, by attention
}
"""Where features of images cannot be dropped before they are among the text."""
SPLIT = {"llava_next": {"decoder": 4}}  # counts patches with NumPy: the text is a piece of its own
WHOLE = {"llava_next": {"vision": 3, "decoder": 4}}  # as torch.export has it
IN_TOWER = ("llava", "paligemma")  # checked in test_vision.py: their text follows the tower
STACKS: dict[str, dict[str, int]] = {
    "bert": {"encoder": 4},
    "roberta": {"encoder": 4},
    "modernbert": {"encoder": 4},
    "t5": {"encoder": 3, "decoder": 3},
    "bart": {"encoder": 3, "decoder": 3},
    "whisper": {"encoder": 3, "decoder": 3},
    "swin": {"vision": 2, "vision2": 2},
    "timm_swin": {"vision": 2, "vision2": 2},
    "llava": {"vision": 3, "decoder": 4},
    "mllama": {"vision": 3, "decoder": 4},
    "molmo2": {"vision": 3, "decoder": 4},
    "qwen3_vl": {"vision": 3, "decoder": 4},
    **{
        name: {"vision": 2, "decoder": 4}
        for name in (
            *("internvl", "smolvlm", "idefics3", "paligemma", "gemma3"),
            *("llava_onevision", "mistral3", "qwen2_vl", "qwen2_5_vl"),
        )
    },
    **SPLIT,
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
def compiled(name: str, stack: str) -> tuple[list[torch.Tensor], list[list[int]]]:
    """What the compiled model says under a drop, and which tokens it keeps."""
    with TemporaryDirectory() as folder:
        return families.dropped(subject(name), stack, Path(folder), keep=7)


@cache
def by_hand(name: str, stack: str) -> list[torch.Tensor]:
    return families.hand_run(subject(name), stack, compiled(name, stack)[1])


def stacks(name: str) -> dict[str, int]:
    kind = ALL[name].kind
    return STACKS.get(name, {"decoder" if kind == "decoder" else "vision": 4})


def exported_stacks(name: str) -> dict[str, int]:
    return WHOLE.get(name, stacks(name))


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


def cells(*without: str, of: Callable[[str], dict[str, int]] = stacks) -> list[Any]:
    return [(name, stack) for name in CAPTURED for stack in of(name) if stack not in without]


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
        pruned = prune(it.model, rule=path, keep=1.0, among=families.among(it, stack))
        assert families.compared(families.outputs(pruned(**it.inputs)), expected) == 0


@pytest.mark.parametrize(("name", "stack"), _marked(cells("vision2")))
def test_a_drop_equals_the_run_by_hand_or_is_refused(name: str, stack: str, tmp_path: Path) -> None:
    it = subject(name)
    if (name, stack) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, stack]) as caught:
            families.dropped(it, stack, tmp_path, keep=7)
        assert refusal(caught.value).where
        return
    if stack == "vision" and name in IN_TOWER:
        pytest.skip("the text follows the tower: test_vision.py")
    got, kept = compiled(name, stack)
    assert families.compared(got, by_hand(name, stack)) == 0
    _chosen_by_luck(it, stack, kept)
    front = getattr(it.model, "num_prefix_tokens", None)
    if front is not None:  # class and register tokens are no image tokens
        assert all(row[:front] == list(range(front)) and len(row) == front + 7 for row in kept)


def _chosen_by_luck(it: families.Subject, stack: str, kept: list[list[int]]) -> None:
    """The tokens themselves: those that the rule's hash says, padding last."""
    if stack == "vision" or it.sites.paddings.get(stack) is None:
        return
    name = "decoder_attention_mask" if (it.family.kind, stack) == ("encoder-decoder", "decoder") else "attention_mask"
    valid = it.inputs[name].bool()
    images = families.among(it, stack) == "image"
    group = it.inputs["input_ids"] == it.model.config.image_token_id if images else torch.ones_like(valid)
    assert kept == families.kept_by_luck(valid, group, 7, ends=stack == "decoder" and not images)


@pytest.mark.parametrize("name", _marked([n for n in CAPTURED if ALL[n].kind == "vlm" and n not in SPLIT]))
def test_dropping_features_is_dropping_their_tokens_or_is_refused(name: str, tmp_path: Path) -> None:
    it = subject(name)
    torch._dynamo.reset()
    pruned = prune(it.model, rule=families.rule(tmp_path, "features", ""), keep=7)
    if name in FEATURES:
        with pytest.raises(Exception, match=FEATURES[name]) as caught:
            pruned(**it.inputs)
        assert refusal(caught.value).where
        return
    got = families.outputs(pruned(**it.inputs))
    assert families.compared(got, families.hand_run(it, "decoder", pruned.kept[-1], block=0)) == 0


@pytest.mark.parametrize(("name", "stack"), _marked(cells("vision2", of=exported_stacks)))
def test_an_exported_program_keeps_its_bits_and_drops_or_is_refused(name: str, stack: str, tmp_path: Path) -> None:
    it, program = subject(name), exported(name)
    if (name, stack) in REFUSED:
        with pytest.raises(tokcompile.TokredError, match=REFUSED[name, stack]) as caught:
            tokcompile.rewrite(program, **families.options_for(it, stack, tmp_path, keep=7))
        assert caught.value.where
        return
    path, among = families.rule(tmp_path, "group", stack), families.among(it, stack)
    everything = tokcompile.rewrite(program, path, keep=1.0, among=among)
    assert families.compared(families.ran(everything, it), families.ran(program, it)) == 0
    if stack == "vision" and name in IN_TOWER:
        pytest.skip("the text follows the tower: test_vision.py")
    rewritten = tokcompile.rewrite(program, **families.options_for(it, stack, tmp_path, keep=7))
    assert families.compared(families.ran(rewritten, it), by_hand(name, stack)) <= EXPORT_DIFFERS.get(name, 0)
