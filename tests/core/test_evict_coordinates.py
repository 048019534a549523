"""evict, with keys by rank, where tokens stand in time, height and width: a position of its own turns each pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import streamed
import torch
from core.test_family_generate import longer
from families import Subject, subject
from harness import difference, greedy, refusal
from torch import Tensor

import tokcompile
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, STEPS = 12, 5


def in_sections(sections: list[int]) -> list[int]:
    """Each coordinate's pairs side by side."""
    return [coordinate for coordinate, count in enumerate(sections) for _ in range(count)]


def in_turn(sections: list[int]) -> list[int]:
    """Time, height and width by turns, as far as height and width have pairs; time has what is left."""
    turned = [0] * sum(sections)
    for coordinate in (1, 2):
        for place in range(coordinate, 3 * sections[coordinate], 3):
            turned[place] = coordinate
    return turned


FAMILIES: dict[str, Callable[[list[int]], list[int]]] = {
    "qwen2_vl": in_sections,
    "qwen2_5_vl": in_sections,
    "qwen3_vl": in_turn,
}
WHEN = ("both", "prefill", "decode")
CELLS = [
    pytest.param(name, when, marks=() if when == "both" and name != "qwen2_5_vl" else (pytest.mark.slow,))
    for name in FAMILIES
    for when in WHEN
]


def by_hand(it: Subject, policy: streamed.Policy, inputs: dict[str, Any], more: Tensor, name: str) -> Tensor:
    """Logits of the last prompt token and those that follow, of one run over all tokens."""
    text, prompt = it.model.model.language_model, inputs["input_ids"].shape[1]
    for column in range(more.shape[1]):
        inputs = longer(it, inputs, more[:, column : column + 1])
    turned = FAMILIES[name](text.config.rope_parameters["mrope_section"])
    policy = replace(policy, waves=text.rotary_emb.inv_freq.double())

    def keep_positions(module: Any, args: Any, words: Any) -> None:
        positions = words["position_ids"] if "position_ids" in words else args[1]
        policy.positions = positions[turned].permute(1, 2, 0)

    handle = text.rotary_emb.register_forward_pre_hook(keep_positions, with_kwargs=True)
    real = inputs["attention_mask"].bool()
    try:
        with streamed.streamed(it.model, policy, prompt, real), torch.no_grad():
            logits = it.model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    of_image = policy.positions[..., turned.index(1)] != policy.positions[..., turned.index(0)]
    assert (of_image & real).any(), "no token stands in rows and columns"
    return logits[:, prompt - 1 :]


@pytest.mark.parametrize(("name", "when"), CELLS)
def test_generate_equals_attention_on_lists(name: str, when: str) -> None:
    family = catalogue.family(name)
    it = subject(family)
    inputs = family.example(it.model, batch=2, padded=True, length=17)
    tokcompile.compile(it.model, target="eager", rule="streamingllm", budget=BUDGET, sinks=7, when=when)
    out = it.model.generate(**inputs, **greedy(STEPS))
    tokcompile.restore(it.model)
    best = streamed.best(BUDGET, sinks=7)
    policy = streamed.Policy(streamed.age, best, prompt=when != "decode", later=when != "prefill")
    expected = by_hand(it, policy, inputs, out.sequences[:, -STEPS:-1], name)
    assert difference(torch.stack(out.logits, 1), expected) <= 2e-5
    longest = BUDGET + (STEPS - 1 if when == "prefill" else 0)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {longest}


def test_positions_of_merged_tokens_are_not_taken_for_those_of_their_keys() -> None:
    """Each pair of a merged token's key was turned by the position of some member, which no map of tokens tells."""
    family = catalogue.family("qwen2_5_vl")
    it = subject(family)
    inputs = family.example(it.model, batch=2, padded=True, length=17)
    rules = [{"rule": "ppe", "slots": 1}, {"rule": "streamingllm", "budget": BUDGET}]
    tokcompile.compile(it.model, target="eager", rules=rules)
    with pytest.raises(Exception, match="not made of products of positions and frequencies") as caught:
        it.model.generate(**inputs, **greedy(2))
    tokcompile.restore(it.model)
    assert any("streamingllm.yaml" in place for place in refusal(caught.value).where)
