"""evict: which keys and values a prompt's caches keep, and what later steps then say, against runs by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import partial
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import check_rows_alone, difference, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, STEPS = 9, 4
PADS = (0, 3, 22)
"""The last row has fewer real tokens than the budget."""
RULES: dict[str, tuple[dict[str, Any], Callable[[int], cached.Score], dict[str, int]]] = {
    "snapkv": ({"window": 4, "kernel": 3}, lambda block: partial(cached.votes, window=4, kernel=3), {"recent": 4}),
    "snapkv-max": (
        {"window": 2, "kernel": 5, "pool": "max"},
        lambda block: partial(cached.votes, window=2, kernel=5, pool="max"),
        {"recent": 2},
    ),
    "adakv": (
        {"window": 4, "kernel": 3},
        lambda block: partial(cached.votes, window=4, kernel=3, pool="max"),
        {"recent": 4},
    ),
    "adakv-reserve": (
        {"window": 2, "kernel": 1, "pool": "avg", "floor": 0.5, "floor_by": "reserve"},
        lambda block: partial(cached.votes, window=2),
        {"recent": 2},
    ),
    "pyramidkv": (
        {"window": 2, "kernel": 1, "beta": 4},
        lambda block: partial(cached.votes, window=2),
        {"recent": 2},
    ),
    "h2o": ({"recent": 3, "when": "prefill"}, lambda block: partial(cached.mass, reduce="sum"), {"recent": 3}),
    "h2o-seen": (
        {"recent": 0, "sinks": 2, "reduce": "seen", "when": "prefill"},
        lambda block: partial(cached.mass, reduce="seen"),
        {"sinks": 2},
    ),
    "knorm": ({"sinks": 1}, lambda block: cached.smallness, {"sinks": 1}),
    "keydiff": ({"recent": 1}, lambda block: cached.difference_to_mean, {"recent": 1}),
    "random_kv": ({"seed": 3}, lambda block: partial(cached.luck, seed=3, block=block), {}),
}
JOINT = {"adakv": cached.Joint(), "adakv-reserve": cached.Joint(Fraction(1, 2), "reserve")}
"""Rules under which heads share a budget."""


def options(rule: str, budget: Any = BUDGET) -> dict[str, Any]:
    return {"rule": rule.partition("-")[0], "budget": budget, **RULES[rule][0]}


def by_hand(rule: str, model: nn.Module, inputs: dict[str, Tensor]) -> list[list[list[list[int]]]]:
    """The keys that stay: for each layer, row and cached head."""
    _, score, ends = RULES[rule]
    with cached.observed(model) as calls, torch.no_grad():
        model(**inputs)
    tokens = inputs["input_ids"].shape[1]
    calls = [call for call in calls if call.query.shape[2] == tokens]
    budgets = [BUDGET] * len(calls)
    if rule == "pyramidkv":
        budgets = cached.pyramid(BUDGET, 2, 4, len(calls), tokens)
        assert len(set(budgets)) > 1
    real = inputs["attention_mask"].bool().tolist()
    return cached.choices(calls, real, score, budgets, JOINT.get(rule), **ends)


USUAL = {*((rule, "llama") for rule in RULES if rule != "adakv-reserve"), ("snapkv", "llava"), ("h2o", "gpt2")}
CELLS = [
    pytest.param(rule, model, marks=() if (rule, model) in USUAL else (pytest.mark.slow,))
    for rule in RULES
    for model in ("llama", "qwen2", "gpt2", "opt", "llava")
]


@pytest.mark.parametrize(("rule", "name"), CELLS)
def test_caches_hold_the_keys_of_the_run_by_hand(rule: str, name: str) -> None:
    model = fleet.build(name)
    inputs = fleet.example(model, 3, PADS, text=25)
    chosen = by_hand(rule, model, inputs)
    with torch.no_grad():
        full = model(**inputs)
    out = prune(model, **options(rule))(**inputs)
    assert difference(out.logits, full.logits) == 0
    for layer, whole, rows in zip(out.past_key_values.layers, full.past_key_values.layers, chosen, strict=True):
        most = max(sum(map(len, heads)) if rule in JOINT else max(map(len, heads)) for heads in rows)
        assert layer.keys.shape[2] * (layer.keys.shape[1] if rule in JOINT else 1) == most
        cached.check_held(layer, whole.keys, whole.values, rows, rule in JOINT)


@pytest.mark.parametrize(("rule", "name"), CELLS)
def test_generate_equals_a_run_that_hides_what_was_evicted(rule: str, name: str) -> None:
    """Queries after the prompt see the keys that stayed, at the positions that they had; no padding."""
    model = fleet.build(name)
    inputs = fleet.example(model, 3, PADS, text=25)
    tokens = inputs["input_ids"].shape[1]
    counted = cached.continued(inputs, inputs["input_ids"][:, :0])
    stay = cached.masks(by_hand(rule, model, counted), tokens)
    tokcompile.compile(model, target="eager", **options(rule))
    out = model.generate(**inputs, **greedy(STEPS), suppress_tokens=[fleet.IMAGE])
    tokcompile.restore(model)
    more = out.sequences[:, -STEPS:-1]
    with cached.observed(model, stay, tokens), torch.no_grad():
        expected = model(**cached.continued(inputs, more), use_cache=False).logits[:, -STEPS:]
    assert difference(torch.stack(out.logits, 1), expected) <= 2e-5


@pytest.mark.parametrize("rule", ["snapkv", *(pytest.param(r, marks=pytest.mark.slow) for r in ("adakv", "pyramidkv"))])
def test_a_question_of_several_tokens_sees_what_stayed(rule: str) -> None:
    """Layers whose caches differ in length, under one mask of padding, with several queries at once."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 3, PADS, text=25)
    tokens = inputs["input_ids"].shape[1]
    counted = cached.continued(inputs, inputs["input_ids"][:, :0])
    stay = cached.masks(by_hand(rule, model, counted), tokens)
    question = torch.randint(5, 60, (3, 6), generator=torch.Generator().manual_seed(1))
    both = cached.continued(inputs, question)
    with cached.observed(model, stay, tokens), torch.no_grad():
        expected = model(**both, use_cache=False).logits[:, tokens:]
    tokcompile.compile(model, target="eager", **options(rule))
    with torch.no_grad():
        cache = model(**counted).past_key_values
        got = model(
            input_ids=question,
            attention_mask=both["attention_mask"],
            position_ids=both["position_ids"][:, tokens:],
            past_key_values=cache,
        ).logits
    tokcompile.restore(model)
    assert difference(got, expected) <= 2e-5


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_plain_compile_keeps_the_same_and_generates_the_same(target: str) -> None:
    """Caches of one length need no mask of ours."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 3, PADS, text=25)
    tokcompile.compile(model, target="eager", **options("snapkv"))
    expected = model.generate(**inputs, **greedy(STEPS))
    tokcompile.restore(model)
    torch._dynamo.reset()
    model.compile(backend="tokred", options={**options("snapkv"), "target": target})
    got = model.generate(**inputs, **greedy(STEPS))
    assert torch.equal(got.sequences, expected.sequences)
    assert difference(torch.stack(got.logits, 1), torch.stack(expected.logits, 1)) <= 2e-5
    for one, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert difference(one.keys, other.keys) <= 2e-5


def test_one_graph_serves_prompts_of_many_lengths() -> None:
    model = fleet.build("llama")
    pruned = prune(model, dynamic=True, **options("knorm"))
    for text in (5, 20, 33):
        inputs = fleet.example(model, 2, (0, 3), text=text)
        (row, *_), *_ = by_hand("knorm", model, inputs)
        cache = pruned(**inputs).past_key_values.layers[0]
        with torch.no_grad():
            whole = model(**inputs).past_key_values.layers[0]
        assert cache.keys.shape[2] == min(BUDGET, text + 1)
        assert torch.equal(cache.keys[0, 0], whole.keys[0, 0, row[0]])
    assert len(pruned.report.graphs) == 1


def test_a_model_of_windows_alone_is_refused() -> None:
    model = fleet.build("mistral")
    with pytest.raises(Exception, match="every block attends in a window") as caught:
        prune(model, **options("knorm"))(**fleet.example(model, 2, text=25))
    assert refusal(caught.value).where[-1].startswith("decoder.*.cache")


def test_caches_of_windows_stay_beside_those_that_are_shortened() -> None:
    """Gemma 2 attends in a window of 12 in every other block."""
    model = fleet.build("gemma2", attention="eager")
    inputs = fleet.example(model, 2, text=25)
    with torch.no_grad():
        full = model(**inputs)
    out = prune(model, **options("knorm"))(**inputs)
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert (
        lengths
        == [11, BUDGET, 11]
        == [layer.keys.shape[2] if i != 1 else BUDGET for i, layer in enumerate(full.past_key_values.layers)]
    )


def test_a_call_without_a_cache_is_the_models_own() -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, text=25)
    pruned = prune(model, **options("snapkv"))
    with torch.no_grad():
        assert difference(pruned(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits) == 0
    assert "nothing to score" in pruned.report.graphs[0][0].steps[0]["note"]


def test_a_budget_without_room_for_what_stays_is_refused() -> None:
    model = fleet.build("llama")
    with pytest.raises(Exception, match="no room for the tokens that stay") as caught:
        prune(model, rule="snapkv", budget=4, window=5)(**fleet.example(model, 2, text=25))
    assert "snapkv.yaml" in "".join(refusal(caught.value).where)


@pytest.mark.parametrize("first", [{"rule": "hiprune", "keep": 6}, {"rule": "fastv", "layer": 1, "keep": 5}])
def test_generate_after_a_drop_and_an_eviction_is_each_row_alone(first: dict[str, Any]) -> None:
    """A drop of image tokens leaves the padding, which the eviction takes: it is handed on, as no later mask tells."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (0, 5), text=9)
    rules = [first, options("snapkv", 12)]
    both = check_rows_alone(model, rules, inputs, (0, 5), STEPS)
    assert {layer.keys.shape[2] for layer in both.past_key_values.layers} == {12 + STEPS - 1}


def test_nothing_is_changed_after_an_eviction() -> None:
    model = fleet.build("llava")
    with pytest.raises(Exception, match="cannot be changed after its keys were evicted") as caught:
        prune(model, rules=[options("snapkv"), {"rule": "fastv", "keep": 5}])(**fleet.example(model, 2, text=9))
    assert "evict last" in refusal(caught.value).remedy


def test_images_have_a_budget_of_their_own(tmp_path: Any) -> None:
    """Keys of text stay, all of them."""
    path = tmp_path / "quiet_images.yaml"
    path.write_text("""
rule: quiet_images
about: Keep some keys of images.
steps:
  - score: {name: sizes, by: norm, at: "decoder.*.cache", largest: false}
  - select: {name: kept, by: topk, scores: sizes, among: image, keep: 5}
  - evict: {at: "decoder.*.cache", keep: kept}
""")
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (0, 3), text=9)
    with torch.no_grad():
        whole = model(**inputs).past_key_values
    out = prune(model, rule=str(path))(**inputs)
    image = inputs["input_ids"] == fleet.IMAGE
    for layer, full in zip(out.past_key_values.layers, whole.layers, strict=True):
        for row in range(2):
            for head in range(full.keys.shape[1]):
                keys = full.keys[row, head]
                places = image[row].nonzero()[:, 0].tolist()
                best = sorted(places, key=lambda j, keys=keys: (float(keys[j].norm()), j))[:5]
                stay = [j for j in range(len(keys)) if j not in places or j in best]
                assert torch.equal(layer.keys[row, head], keys[stay])


def test_two_evictions_of_one_cache_are_refused() -> None:
    model = fleet.build("llama")
    rules = [options("snapkv"), options("knorm")]
    with pytest.raises(Exception, match="evicted before"):
        prune(model, rules=rules)(**fleet.example(model, 2, text=25))


def test_a_step_without_positions_is_refused() -> None:
    """Counted from the short cache they would be wrong, silently."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=25)
    tokcompile.compile(model, target="eager", **options("snapkv"))
    with torch.no_grad():
        cache = model(input_ids=inputs["input_ids"]).past_key_values
        with pytest.raises(Exception, match="counts its position from the cache"):
            model(input_ids=inputs["input_ids"][:, :1], past_key_values=cache)
    tokcompile.restore(model)
