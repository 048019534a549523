"""Exported programs that return caches, under rules that evict: a prompt and the step after it."""

from __future__ import annotations

import copy
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import difference, prune

import tokcompile

pytestmark = pytest.mark.usefixtures("one_thread")
RULES: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": 9, "window": 4},
    "pyramidkv": {"budget": 9, "window": 2, "beta": 4},
    "keydiff": {"budget": "1/3", "recent": 1},
}


@pytest.mark.parametrize("rule", ["snapkv", *(pytest.param(r, marks=pytest.mark.slow) for r in RULES if r != "snapkv")])
def test_an_exported_prompt_returns_the_caches_of_the_compiled_one(rule: str) -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, (0, 3), text=25)
    program = tokcompile.rewrite(tokcompile.export(model, inputs), rule=rule, **RULES[rule])
    got = program.module()(**inputs)
    expected = prune(model, rule=rule, **RULES[rule])(**inputs)
    assert torch.equal(got.logits, expected.logits)
    for one, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert one.keys.shape[2] < inputs["input_ids"].shape[1]
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_an_exported_step_goes_on_from_a_shortened_cache() -> None:
    """With a row that is padding and fewer tokens than the budget, whose cache still holds padding."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 3, (0, 3, 22), text=25)
    options = {"rule": "snapkv", **RULES["snapkv"]}
    counted = cached.continued(inputs, inputs["input_ids"][:, :0])
    both = cached.continued(inputs, inputs["input_ids"][:, -1:])
    prompt = tokcompile.rewrite(tokcompile.export(model, counted), **options)
    with torch.no_grad():
        cache = prompt.module()(**counted).past_key_values
    step = {name: both[name][:, -1:] for name in ("input_ids", "position_ids")}
    step |= {"attention_mask": both["attention_mask"]}
    later = tokcompile.export(model, {**step, "past_key_values": copy.deepcopy(cache)})
    got = tokcompile.rewrite(later, **options).module()(**step, past_key_values=copy.deepcopy(cache))
    tokcompile.compile(model, target="eager", **options)
    with torch.no_grad():
        expected = model(**step, past_key_values=model(**counted).past_key_values).logits
    assert difference(got.logits, expected) <= 1e-6
