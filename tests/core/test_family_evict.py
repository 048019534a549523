"""Evictions after the prompt on every family with a decoder: the keys that the spec's naive form chooses.

The naive forms of `cached` are given the model's own keys, as its cache holds them, and the probabilities that it
returns when its attention is written out. Steps after the prompt then say what the whole model says when what was
evicted is hidden from its queries. A family that cannot be done soundly is refused, with the reason that stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import cached
import families
import pytest
import streamed
import torch
import unloaded
from core import test_key_merge as merging
from core.test_family_generate import LENGTH, longer, positioned
from harness import difference, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile.capturing import imagesizes
from tokcompile.models import catalogue
from tokcompile.rulefile import load_rule, rule_names

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = catalogue.families()
NAMES = [name for name, family in ALL.items() if family.kind in ("decoder", "vlm")]
BUDGET, STEPS = 9, 3
Ends = dict[str, int]

RULES: dict[str, tuple[dict[str, Any], Callable[[int], cached.Score], Ends]] = {
    "snapkv": ({"window": 4, "kernel": 3}, lambda block: partial(cached.votes, window=4, kernel=3), {"recent": 4}),
    "adakv": (
        {"window": 4, "kernel": 3},
        lambda block: partial(cached.votes, window=4, kernel=3, pool="max"),
        {"recent": 4},
    ),
    "pyramidkv": (
        {"window": 2, "kernel": 1, "beta": 4},
        lambda block: partial(cached.votes, window=2),
        {"recent": 2},
    ),
    "h2o": (
        {"recent": 3, "when": "prefill"},
        lambda block: partial(cached.mass, reduce="sum"),
        {"recent": 3},
    ),
    "knorm": ({"sinks": 1}, lambda block: cached.smallness, {"sinks": 1}),
    "keydiff": ({"recent": 1}, lambda block: cached.difference_to_mean, {"recent": 1}),
    "random_kv": ({"seed": 3}, lambda block: partial(cached.luck, seed=3, block=block), {}),
    "streamingllm": ({"sinks": 2, "positions": "keep"}, lambda block: cached.age, {"sinks": 2}),
    "tova": ({}, lambda block: cached.newest, {"recent": 1}),
    "ems": (
        {"window": merging.WINDOW, "alike": 0.1, "space": "turned"},
        lambda block: merging.attention_twice,
        {"recent": merging.WINDOW},
    ),
    "treekv": (
        {"sinks": 1, "recent": 3, "window": 6, "positions": "keep"},
        lambda block: partial(cached.mass, reduce="seen", window=6),
        {"sinks": 1, "recent": 3},
    ),
    "dapq": ({"count": 4, "content": "repeat"}, lambda block: partial(cached.ahead, count=4), {}),
}
JOINT = ("adakv",)
"""Rules under which the heads of a block share a budget."""
MERGED = ("ems",)
"""Rules under which what goes is merged into what stays."""
AHEAD = {"dapq": 4}
"""Rules under which copies of the prompt's last token stand behind it for a while, and how many."""
CHOICES: dict[str, cached.Choice] = {"adakv": cached.Joint(), "treekv": streamed.Turns()}
"""How keys are chosen by their scores, where it is not the best of each head."""
CONTINUED = ("snapkv", "adakv", "pyramidkv", "knorm")
"""Rules whose later steps are run: equal lengths, those of each head, of each block, and few tokens that must stay."""
NOT_EVICTED: dict[str, dict[str, str]] = {
    "every block attends in a window": dict.fromkeys(RULES.keys() - {"dapq"}, "mistral starcoder2"),
    "by place after tokens were put in": {
        "dapq": "mistral starcoder2 gemma2 gemma3_text gemma3 cohere2 exaone4 gpt_oss",
    },
    "which numbers are positions is not known": {"dapq": "gpt2 opt qwen3_vl"},
    "says nothing of those that a rule puts in": {"dapq": "mllama molmo2"},
}
"""Why a rule is refused on some families."""
NOT_CONTINUED: dict[str, dict[str, str]] = {
    "caches of this model cannot differ in length": {"pyramidkv": "gemma2 gpt_oss falcon"},
}
"""Why a rule's later steps are refused on some families, by the compiled prompt."""


def _cell_reasons(reasons: dict[str, dict[str, str]]) -> dict[tuple[str, str], str]:
    """The reason of each family and rule."""
    each = [(why, rule, names.split()) for why, rules in reasons.items() for rule, names in rules.items()]
    return {(name, rule): why for why, rule, names in each for name in names}


REFUSED, ENDED = _cell_reasons(NOT_EVICTED), _cell_reasons(NOT_CONTINUED)
OWN_ATTENTION = {"falcon": "FalconAttention"}
"""Models whose attention is their own, not transformers' to choose, and its class."""
USUAL = {("deepseek_v3", "snapkv"), ("gemma2", "snapkv"), ("mistral", "snapkv")}
USUALLY_CONTINUED = {("gemma2", "snapkv"), ("gpt_oss", "pyramidkv")}
"""What `make test` runs; `make test-slow` runs all."""


def _cells(usual: set[tuple[str, str]], *rules: str) -> list[Any]:
    cells = [(name, rule) for name in NAMES for rule in rules]
    marks = {cell: () if cell in usual else (pytest.mark.slow,) for cell in cells}
    return [pytest.param(*cell, marks=marks[cell], id="-".join(cell)) for cell in cells]


def test_every_rule_that_evicts_after_the_prompt_is_tried() -> None:
    evicting = {name for name in rule_names() if any(step.verb == "evict" for step in load_rule(name).steps)}
    assert set(RULES) <= evicting


class Whole(NamedTuple):
    """A family's model on a padded prompt, and tokens that stand behind it for a while, with all that it caches.

    Attributes:
        it: with the inputs of the prompt, positions among them.
        prompt: what `generate` is given.
        logits: of the prompt.
        caches: for each block keys and values of the prompt; [B, H, T, D], or a window's.
        weights: for each block its probabilities, [B, H, T, T], of the tokens behind as well.
    """

    it: families.Subject
    prompt: dict[str, Tensor]
    logits: Tensor
    caches: list[tuple[Tensor, Tensor]]
    weights: list[Tensor]

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, padding counted."""
        return self.it.inputs["input_ids"].shape[1]

    @property
    def own(self) -> list[int]:
        """The blocks that attend to the text itself; others read images."""
        return [block for block, weights in enumerate(self.weights) if weights.shape[-1] == self.tokens]

    @property
    def full(self) -> list[int]:
        """The blocks whose caches hold all of them."""
        return [i for i, (keys, _) in enumerate(self.caches) if keys.shape[2] == self.tokens]


@cache
def whole(name: str, ahead: int) -> Whole:
    family = ALL[name]
    if why := unloaded.missing(family.needs):
        pytest.skip(why)
    it = families.subject(family, length=LENGTH.get(name, 17))
    prompt = family.example(it.model, batch=2, padded=True, length=LENGTH.get(name, 17))
    it.inputs = positioned(it, {key: value for key, value in it.inputs.items() if key != "use_cache"})
    ids = it.inputs["input_ids"]
    inputs, tokens = extended(it, ids[:, -1:].expand(-1, ahead)), ids.shape[1]
    with torch.no_grad():
        out = it.model(**inputs)
        with written_out(it.model):
            weights = it.model(**inputs, output_attentions=True).attentions
    layers = out.past_key_values.layers
    ends = [tokens if layer.keys.shape[2] == tokens + ahead else None for layer in layers]
    held = [(layer.keys[:, :, :end], layer.values[:, :, :end]) for layer, end in zip(layers, ends, strict=True)]
    return Whole(it, prompt, out.logits[:, :tokens], held, list(weights))


def extended(it: families.Subject, more: Tensor) -> dict[str, Tensor]:
    """The prompt with further tokens behind it, int64 [B, N]."""
    inputs = it.inputs
    for column in range(more.shape[1]):
        inputs = longer(it, inputs, more[:, column : column + 1])
    return positioned(it, {key: value for key, value in inputs.items() if key != "position_ids" or value.ndim > 2})


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """Let a model's text compute its attention in the open."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def options(rule: str) -> dict[str, Any]:
    return {"rule": rule, "budget": BUDGET, **RULES[rule][0]}


def chosen(of: Whole, rule: str) -> dict[int, list[list[list[int]]]]:
    """For each block whose cache is shortened the keys that stay of each row and head."""
    _, score, ends = RULES[rule]
    budgets = dict.fromkeys(of.full, BUDGET)
    if rule == "pyramidkv":
        budgets = dict(zip(of.full, cached.pyramid(BUDGET, 2, 4, len(of.full), of.tokens), strict=True))
        assert len(set(budgets.values())) == len(budgets)
    real = of.it.inputs["attention_mask"].bool().tolist()
    stay = {}
    for block, budget in budgets.items():
        seen = cached.Seen(of.weights[block], of.caches[block][0], of.weights[block])
        (stay[block],) = cached.choices(
            [seen], real, lambda _, block=block: score(block), [budget], CHOICES.get(rule), **ends
        )
    return stay


@pytest.mark.parametrize(("name", "rule"), _cells(USUAL, *RULES))
def test_caches_hold_the_keys_of_the_naive_form_or_the_rule_is_refused(name: str, rule: str) -> None:
    of = whole(name, AHEAD.get(rule, 0))
    torch._dynamo.reset()
    pruned = prune(of.it.model, **options(rule))
    if (name, rule) in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name, rule]) as caught:
            pruned(**of.it.inputs)
        assert refusal(caught.value).where
        return
    out = pruned(**of.it.inputs)
    assert difference(out.logits, of.logits) == 0
    assert len(pruned.report.graphs) == 1
    stay = chosen(of, rule)
    for block, (layer, (keys, values)) in enumerate(zip(out.past_key_values.layers, of.caches, strict=True)):
        if block not in stay:
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
            continue
        most = max(sum(map(len, heads)) for heads in stay[block])
        assert layer.keys.shape[1] * layer.keys.shape[2] == most
        if rule in MERGED:
            continue
        cached.check_held(layer, keys, values, stay[block], rule in JOINT)
    if rule in MERGED:
        layers = [out.past_key_values.layers[block] for block in stay]
        full = [SimpleNamespace(keys=of.caches[block][0], values=of.caches[block][1]) for block in stay]
        assert merging.check(layers, full, [merged(of, rule, block) for block in stay]) > 0


def merged(of: Whole, rule: str, block: int) -> list[list[list[Any]]]:
    """For each row and head of a block what its cache holds where keys are merged as they are cached."""
    given, score, _ = RULES[rule]
    keys, values = of.caches[block]
    rows: list[list[list[Any]]] = []
    for row, valid in enumerate(of.it.inputs["attention_mask"].bool()):
        places = valid.nonzero()[:, 0].tolist()
        heads = score(block)(cached.Seen(of.weights[block], keys, of.weights[block]), row, places)
        rows.append([])
        for scores, key, value in zip(heads, keys[row, :, places], values[row, :, places], strict=True):
            found = merging.of_head(scores, key, key, value, None, BUDGET, given["alike"])
            rows[-1].append([(places[c], [places[j] for j in group], k, v) for c, group, k, v in found])
    return rows


@pytest.mark.parametrize(
    ("name", "rule"), [cell for cell in _cells(USUALLY_CONTINUED, *CONTINUED) if cell.values not in REFUSED]
)
def test_generate_equals_a_run_that_hides_what_was_evicted(name: str, rule: str) -> None:
    of = whole(name, 0)
    if (name, rule) in ENDED:
        with pytest.raises(Exception, match=ENDED[name, rule]) as caught:
            generated(of, **options(rule))
        error = refusal(caught.value)
        assert error.where and error.remedy
        return
    got, more = generated(of, **options(rule))
    inputs = extended(of.it, more[:, : STEPS - 1])
    masks = dict(zip(stay := chosen(of, rule), cached.masks(list(stay.values()), of.tokens), strict=True))
    seen = [masks.get(block, _all(of.caches[block][0], of.tokens)) for block in of.own]
    with hiding(of, seen), torch.no_grad():
        expected = of.it.model(**inputs, use_cache=False).logits[:, -STEPS:]
    assert difference(got, expected) <= 1e-4


@contextmanager
def hiding(of: Whole, stay: list[Tensor]) -> Iterator[None]:
    """Let queries after the prompt see of it what stays alone."""
    model = of.it.model
    if of.it.family.name not in OWN_ATTENTION:
        with cached.observed(model, stay, of.tokens) as calls:
            yield
        assert len(calls) == len(stay)
        return
    sites = [m for m in model.modules() if type(m).__name__ == OWN_ATTENTION[of.it.family.name]]
    each = zip(sites, stay, strict=True)
    hooks = [m.register_forward_pre_hook(_masked(seen, of.tokens), with_kwargs=True) for m, seen in each]
    try:
        with written_out(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _masked(stay: Tensor, prompt: int) -> Any:
    """Add to an additive mask what is hidden: `stay` is bool [B, H, prompt]."""

    def add(module: nn.Module, args: Any, kwargs: Any) -> Any:
        mask = kwargs["attention_mask"].expand(-1, stay.shape[1], -1, -1).clone()
        mask[:, :, prompt:, :prompt].masked_fill_(~stay[:, :, None], torch.finfo(mask.dtype).min)
        return args, {**kwargs, "attention_mask": mask}

    return add


def _all(keys: Tensor, tokens: int) -> Tensor:
    return torch.ones(*keys.shape[:2], tokens, dtype=torch.bool)


def generated(of: Whole, **given: Any) -> tuple[Tensor, Tensor]:
    """Logits of a prompt's last token and of steps after it, [B, STEPS, V], and the tokens that were chosen."""
    torch._dynamo.reset()
    with compiled(of, **given):
        out = of.it.model.generate(**of.prompt, **greedy(STEPS))
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:]


@contextmanager
def compiled(of: Whole, **given: Any) -> Iterator[None]:
    """The model under a rule, for a while."""
    tokcompile.compile(of.it.model, target="eager", **given)
    try:
        yield
    finally:
        tokcompile.restore(of.it.model)
        imagesizes.install(of.it.model)  # which restore takes back, and without which some models come apart
