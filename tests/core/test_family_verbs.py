"""Rules that merge, mark, insert, place or rotate, on every family with a decoder: what holds whatever they do.

A prompt and its steps from the cache say what one run over all tokens says, at whatever columns the tokens stand; no
row sees another; an exported program says the same. What each rule computes is compared with runs by hand elsewhere, on
the models of the fleet.
"""

from __future__ import annotations

import itertools
from typing import Any

import families
import pytest
import torch
import unloaded
from core.test_family_generate import LENGTH, longer, positioned
from harness import greedy, prune, refusal
from torch import Tensor

import tokcompile
from tokcompile.capturing import imagesizes
from tokcompile.models import catalogue
from tokcompile.rulefile import load_rule, rule_names

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = catalogue.families()
STEPS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "tome": {"pairs": 1},
    "visionzip": {"dominant": 4, "contextual": 2, "queries": "all"},
    "tokenflex": {"n": 2},
    "vqtoken": {"codes": 5},
    "aot": {"keep": 6, "windows": 1},
    "svit_sta": {"cell": 2},
    "pospad": {"keep": 6},
    "hita": {"queries": 2},
    "v2pe": {"delta": "1/4"},
    "ppe": {"keep": 5, "slots": 1},
    "meta_tokens": {"places": "every"},
    "carope": {},
    "seqpe": {},
    "rope_scaling": {"factor": 2.0},
}
OF_TEXT = ("meta_tokens", "carope", "seqpe", "rope_scaling")
"""Rules that need no images."""
COORDINATES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Positions in time, height and width are kept: they cannot be numbered anew."""
SHIFTS = ("meta_tokens",)
"""Rules whose tokens stand at columns, so that more padding moves them."""
REFUSALS: dict[str, dict[str, str]] = {
    "the model takes the token axis apart": {
        "tome": "internvl smolvlm idefics3 gemma3 mllama llava_next llava_onevision",
        "visionzip": "llava_next llava_onevision",
        "tokenflex": "llava_next llava_onevision",
        "hita": "gemma3 mllama llava_onevision",
    },
    "the model picks tokens by their number": {"tome": "molmo2"},
    "pairs are merged in a value": {"tome": "qwen2_vl qwen2_5_vl qwen3_vl mistral3"},
    "needs 'vision.class_tokens'": {"visionzip": "qwen2_vl qwen2_5_vl qwen3_vl"},
    "scores of one sequence cannot be used for another": {
        "visionzip": "internvl smolvlm idefics3 gemma3 mistral3",
        "pospad": "molmo2 llava_next llava_onevision",
    },
    "tokens can be merged in a value": {
        "visionzip": "mllama",
        "tokenflex": "qwen2_5_vl mllama",
        "vqtoken": "smolvlm idefics3",
        "aot": "smolvlm idefics3",
        "ppe": "smolvlm idefics3",
    },
    "this graph has no projector": {
        "visionzip": "molmo2",
        "tokenflex": "molmo2",
        "vqtoken": "molmo2",
        "aot": "molmo2",
        "ppe": "molmo2",
    },
    "pooling needs the patch grid": {"tokenflex": "qwen2_vl qwen3_vl"},
    "transport needs the patches of a grid": {"aot": "qwen2_vl qwen2_5_vl qwen3_vl llava_next llava_onevision"},
    "needs 'image.tokens'": {"aot": "mllama"},
    "super tokens have no place in this attention": {
        "svit_sta": "qwen2_vl qwen2_5_vl qwen3_vl mistral3 smolvlm idefics3 mllama",
    },
    "super tokens need the patch grid": {"svit_sta": "molmo2"},
    "tokens can be inserted into a value": {"hita": "qwen2_vl qwen2_5_vl qwen3_vl mistral3"},
    "what a mask hides is not known": {"hita": "smolvlm idefics3"},
    "the model takes all tokens together": {"hita": "molmo2"},
    "would be spliced into a text, which has no place": {"hita": "paligemma"},
    "markers cannot stand where attention has a window": {"pospad": "gemma3"},
    "markers stand for image tokens in a text": {"pospad": "mllama"},
    "no image tokens in this graph": {"v2pe": "mllama"},
    "would mask more keys than the edit leaves": {"ppe": "mllama"},
    "clusters need rows of one image": {"ppe": "llava_next llava_onevision"},
    "two tokens would have one position": {"meta_tokens": "qwen2_vl qwen2_5_vl qwen3_vl"},
    "the model takes some of the keys or queries by place after tokens were put in": {
        "meta_tokens": "mistral gemma2 gemma3_text gemma3 cohere2 starcoder2 exaone4 gpt_oss",
    },
    "positions cannot be compacted: the decoder has no rotary positions": {"meta_tokens": "gpt2 opt"},
    "a value that a model made for its own tokens": {"meta_tokens": "mllama"},
    "positions have several coordinates": {
        "v2pe": "qwen2_vl qwen2_5_vl qwen3_vl",
        "seqpe": "qwen2_vl qwen2_5_vl qwen3_vl",
    },
    "content cannot take the place of rotations": {"carope": "qwen2_vl qwen2_5_vl qwen3_vl"},
    "the decoder has no rotary tables": {"carope": "gpt2 opt", "seqpe": "gpt2 opt", "rope_scaling": "gpt2 opt"},
    "this rotation cannot be deleted": {"seqpe": "deepseek_v3"},
}
"""Why a rule is refused on some families: what its error says, and where."""
REFUSED = {
    (name, rule): reason
    for reason, rules in REFUSALS.items()
    for rule, names in rules.items()
    for name in names.split()
}
UNCACHED = {("mllama", "vqtoken"): "would mask more keys"}
"""Rules that a model takes with use_cache=False alone."""
USUAL = {("llama", "carope"), ("qwen2_vl", "vqtoken")}
"""What `make test` runs; `make test-slow` runs all."""


def _cells() -> list[Any]:
    kinds = {"vlm": tuple(OPTIONS), "decoder": OF_TEXT}
    cells = [(name, rule) for name, family in ALL.items() for rule in kinds.get(family.kind, ())]
    marks = {cell: () if cell in USUAL else (pytest.mark.slow,) for cell in cells}
    return [pytest.param(*cell, marks=marks[cell], id="-".join(cell)) for cell in cells]


def test_every_rule_of_these_verbs_is_tried() -> None:
    others = {"divprune", "fastv", "hiprune", "random"}  # in test_family_rules
    alone = {"image", "aot_video"}  # returns no logits; takes videos: each in a test of its own
    caches = {name for name in rule_names() if any(s.verb in ("evict", "route") for s in load_rule(name).steps)}
    assert set(OPTIONS) | others | alone | caches == set(rule_names())


def _options(name: str, rule: str, tokens: int) -> dict[str, Any]:
    """Options for a prompt of a number of tokens."""
    params = tokcompile.rulefile.load_rule(rule).params
    keeps = {"positions": "keep"} if "positions" in params and name in COORDINATES else {}
    share = {"share": 1 / _period(tokens)} if "places" in params else {}
    return {"rule": rule, **OPTIONS[rule], **keeps, **share}


def _period(tokens: int) -> int:
    """After how many tokens one is put in, so that none falls due after the prompt: steps from a cache insert none."""
    return next(n for n in itertools.count(4) if tokens // n == (tokens + STEPS - 1) // n)


def _padded(inputs: dict[str, Any], columns: int) -> dict[str, Any]:
    """Inputs with more padding on the left of each row."""
    mask, out = inputs["attention_mask"], dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:2] == mask.shape:
            out[name] = torch.cat([torch.zeros_like(value[:, :1]).expand(-1, columns, *value.shape[2:]), value], 1)
        elif name == "position_ids" and value.ndim == 3:
            out[name] = torch.cat([torch.ones_like(value[..., :1]).expand(-1, -1, columns), value], 2)
    if "token_type_ids" in out:
        out["token_type_ids"][:, :columns] = inputs["token_type_ids"][:, -1:]
    if "cross_attention_mask" in out:
        out["cross_attention_mask"][:, :columns] = inputs["cross_attention_mask"][:, :1]
    return out


@pytest.mark.parametrize(("name", "rule"), _cells())
def test_steps_padding_rows_and_export_agree_or_a_rule_is_refused(name: str, rule: str) -> None:
    family = ALL[name]
    if why := unloaded.missing(family.needs):
        pytest.skip(why)
    it = families.subject(family, length=LENGTH.get(name, 17))
    options = _options(name, rule, it.inputs["input_ids"].shape[1])
    torch._dynamo.reset()
    if (name, rule) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, rule]) as caught:
            _generated(it, options)
        assert refusal(caught.value).where
        return
    cache: dict[str, Any] = {}
    if (name, rule) in UNCACHED:
        with pytest.raises(Exception, match=UNCACHED[name, rule]) as caught:
            _generated(it, options)
        assert refusal(caught.value).where
        cache = {"use_cache": False}
    steps, tokens = _generated(it, options, **cache)
    inputs = it.inputs
    for column in range(STEPS - 1):
        inputs = longer(it, inputs, tokens[:, column : column + 1])
    inputs = positioned(it, inputs if rule in SHIFTS else _padded(inputs, 2))
    torch._dynamo.reset()
    pruned = prune(it.model, **options)
    whole = families.outputs(pruned(**inputs))[0]
    assert pruned.report.graphs  # of a model that came apart no piece may be the rule's
    assert families.compared([whole[:, -STEPS:]], [steps]) <= 1e-4
    other = inputs["input_ids"].clone()
    words = it.inputs["input_ids"][0, -2:].tolist()  # text, whatever number stands for images
    other[1, -STEPS:] = torch.where(other[1, -STEPS:] == words[0], *reversed(words))
    again = families.outputs(pruned(**{**inputs, "input_ids": other}))[0]
    assert torch.equal(again[0], whole[0]) and not torch.equal(again[1], whole[1])
    compiled = families.outputs(prune(it.model, **options)(**it.inputs))
    program = tokcompile.rewrite(families.exported(it), **options)
    assert families.compared(families.ran(program, it), compiled) <= 1e-5


def _generated(it: families.Subject, options: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """Logits of a prompt's last token and of steps after it, [B, STEPS, V], and the tokens that were chosen."""
    prompt = it.family.example(it.model, batch=2, padded=True, length=LENGTH.get(it.family.name, 17))
    tokcompile.compile(it.model, target="eager", **options)
    try:
        out = it.model.generate(**prompt, **greedy(STEPS), **more)
    finally:
        tokcompile.restore(it.model)
        imagesizes.install(it.model)  # which restore takes back, and without which some models come apart
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:]
