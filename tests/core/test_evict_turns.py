"""Conversations that go on from a shortened cache: turns, several questions, beams, assistants."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import difference, greedy
from torch import Tensor, nn

import tokcompile
from tokcompile import TokredError

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, STEPS = 9, 3
PADS = (0, 3)
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": BUDGET, "window": 4, "kernel": 3},
    "pyramidkv": {"budget": BUDGET, "window": 2, "kernel": 1, "beta": 4},
    "adakv": {"budget": BUDGET, "window": 4, "kernel": 3, "pool": "avg"},
}
RULES = [
    pytest.param("snapkv"),
    pytest.param("adakv", marks=pytest.mark.slow),
    pytest.param("pyramidkv", marks=pytest.mark.slow),
]
WORDS = {**greedy(STEPS), "suppress_tokens": [fleet.IMAGE]}


@contextmanager
def compiled(model: nn.Module, *rules: dict[str, Any]) -> Iterator[nn.Module]:
    torch._dynamo.reset()
    tokcompile.compile(model, rules=list(rules), target="eager")
    try:
        with torch.no_grad():
            yield model
    finally:
        tokcompile.restore(model)


def rule(name: str) -> dict[str, Any]:
    return {"rule": name, **OPTIONS[name]}


def prompt() -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and a padded prompt with positions as `generate` counts them."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, PADS, text=25)
    return model, cached.continued(inputs, inputs["input_ids"][:, :0])


def stays(name: str, model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """By layer which keys stay, bool [B, Hkv, T]."""
    with cached.observed(model) as calls, torch.no_grad():
        model(**inputs)
    tokens, options = inputs["input_ids"].shape[1], OPTIONS[name]
    budgets = [BUDGET] * len(calls)
    if name == "pyramidkv":
        budgets = cached.pyramid(BUDGET, options["window"], options["beta"], len(calls), tokens)
    votes = partial(cached.votes, window=options["window"], kernel=options["kernel"])
    real = inputs["attention_mask"].bool().tolist()
    joint = cached.Joint() if name == "adakv" else None
    return cached.masks(cached.choices(calls, real, lambda _: votes, budgets, joint, recent=options["window"]), tokens)


def hidden(model: nn.Module, stay: list[Tensor], inputs: dict[str, Tensor], more: Tensor) -> Tensor:
    """Logits of the whole model for tokens after the prompt, which see of it what stays; [B, N, V]."""
    tokens = inputs["input_ids"].shape[1]
    with cached.observed(model, stay, tokens), torch.no_grad():
        return model(**cached.continued(inputs, more), use_cache=False).logits[:, tokens:]


def question(seed: int, tokens: int = 5, rows: int = 2) -> Tensor:
    return torch.randint(5, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def asked(model: nn.Module, cache: Any, inputs: dict[str, Tensor], more: Tensor) -> Any:
    """`generate` from a cache: the new tokens, and a mask of all."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    return model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, **WORDS)


@pytest.mark.parametrize("name", RULES)
def test_a_second_turn_goes_on_from_the_cache(name: str) -> None:
    """Its tokens alone are given, with a mask of all: each sees of the first prompt what stayed."""
    model, inputs = prompt()
    stay = stays(name, model, inputs)
    with compiled(model, rule(name)):
        first = model.generate(**{k: v for k, v in inputs.items() if k != "position_ids"}, **WORDS)
        said = first.sequences[:, -STEPS:]
        # The last token said was not yet read.
        turn = torch.cat([said[:, -1:], question(1)], 1)
        before = {"attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(said[:, :-1])], 1)}
        second = asked(model, first.past_key_values, before, turn)
    more = torch.cat([said[:, :-1], turn, second.sequences[:, -STEPS:-1]], 1)
    assert difference(torch.stack(second.logits, 1), hidden(model, stay, inputs, more)[:, -STEPS:]) <= 2e-5


def test_a_turn_that_gives_the_whole_text_again_is_refused() -> None:
    """`generate` would cut off as many tokens as the cache holds: fewer than were seen."""
    model, inputs = prompt()
    with compiled(model, rule("snapkv")):
        cache = model(**inputs).past_key_values
        whole = cached.continued(inputs, question(1))
        with pytest.raises(TokredError, match="other tokens than its mask says") as caught:
            model.generate(
                input_ids=whole["input_ids"], attention_mask=whole["attention_mask"], past_key_values=cache, **WORDS
            )
        tokens = inputs["input_ids"].shape[1]
        assert caught.value.found == f"{tokens + 5 - BUDGET} tokens after {tokens}, and a mask of {tokens + 5}"
        asked(model, cache, inputs, question(1))


@pytest.mark.parametrize("name", [*RULES[:1], "adakv", *RULES[2:]])
def test_several_questions_on_copies_of_one_cache(name: str) -> None:
    model, inputs = prompt()
    stay = stays(name, model, inputs)
    with compiled(model, rule(name)):
        cache = model(**inputs).past_key_values
        answers = [asked(model, copy.deepcopy(cache), inputs, question(seed)) for seed in (1, 2)]
    for seed, answer in zip((1, 2), answers, strict=True):
        more = torch.cat([question(seed), answer.sequences[:, -STEPS:-1]], 1)
        assert difference(torch.stack(answer.logits, 1), hidden(model, stay, inputs, more)[:, -STEPS:]) <= 2e-5


def test_several_questions_on_copies_of_a_cache_with_numbers_beside_it() -> None:
    """A drop and an eviction hand on how much padding and how many keys: each copy has its own."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (0, 5), text=9)
    with compiled(model, {"rule": "hiprune", "keep": 6}, rule("snapkv")):
        cache = model(**cached.continued(inputs, inputs["input_ids"][:, :0])).past_key_values
        first, second = (asked(model, copy.deepcopy(cache), inputs, question(seed)) for seed in (1, 2))
        again = asked(model, cache, inputs, question(2))
    assert torch.equal(again.sequences, second.sequences)
    assert difference(torch.stack(again.logits, 1), torch.stack(second.logits, 1)) == 0
    assert difference(torch.stack(first.logits, 1), torch.stack(second.logits, 1)) > 1e-3


def test_an_answer_is_taken_back_and_the_prompt_is_not() -> None:
    """Cropped to the end of the prompt, a cache answers another question as a copy would."""
    model, inputs = prompt()
    with compiled(model, rule("snapkv")):
        cache = model(**inputs).past_key_values
        twin = copy.deepcopy(cache)
        asked(model, cache, inputs, question(1))
        cache.crop(-(5 + STEPS - 1))
        got, expected = (asked(model, held, inputs, question(2)) for held in (cache, twin))
        assert difference(torch.stack(got.logits, 1), torch.stack(expected.logits, 1)) == 0
        with pytest.raises(TokredError, match="cannot be cropped") as caught:
            cache.crop(-(5 + STEPS))
    assert "26 are the prompt's" in caught.value.found and "copy of the cache" in caught.value.remedy


@pytest.mark.parametrize("draft", ["model", pytest.param("lookup", marks=pytest.mark.slow)])
def test_an_assistant_is_refused(draft: str) -> None:
    """Its first drafts stand in the prompt, and would have a say in what is evicted."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=25)
    how = {"assistant_model": fleet.build("llama")} if draft == "model" else {"prompt_lookup_num_tokens": 2}
    with compiled(model, rule("snapkv")), pytest.raises(TokredError, match="cannot be cropped") as caught:
        model.generate(**inputs, **WORDS, **how)
    assert "without an assistant" in caught.value.remedy


@pytest.mark.parametrize("name", RULES)
def test_beams_go_on_from_their_own_caches(name: str) -> None:
    """Each beam's score is what the whole model says of its tokens when it is hidden what was evicted."""
    model, inputs = prompt()
    stay = stays(name, model, inputs)
    searched = {**WORDS, "num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "output_scores": True}
    with compiled(model, rule(name)):
        out = model.generate(**{k: v for k, v in inputs.items() if k != "position_ids"}, **searched)
    more = out.sequences[:, -STEPS:]
    wide = {key: value.repeat_interleave(3, 0) for key, value in inputs.items()}
    tokens = inputs["input_ids"].shape[1]
    with cached.observed(model, [mask.repeat_interleave(3, 0) for mask in stay], tokens), torch.no_grad():
        logits = model(**cached.continued(wide, more[:, :-1]), use_cache=False).logits[:, tokens - 1 :]
    said = logits.log_softmax(-1).gather(2, more[..., None])[..., 0].sum(1)
    assert len({tuple(row) for row in more[:3].tolist()}) == 3
    assert difference(said, out.sequences_scores) <= 1e-4


@pytest.mark.parametrize("rule", ["snapkv", "adakv"])
def test_a_step_that_dynamo_runs_without_a_graph_is_refused(rule: str) -> None:
    """At its limit of graphs it runs the model as it is, which takes what is left for all that there was."""
    model = fleet.build("llama")
    tokcompile.compile(model, rule, budget=9, window=4, kernel=3, target="eager")
    try:
        with (
            torch._dynamo.config.patch(recompile_limit=1),
            pytest.raises(TokredError, match="was not compiled") as caught,
        ):
            model.generate(**fleet.example(model, 2, (0, 3), text=25), **greedy(3))
    finally:
        tokcompile.restore(model)
    assert "recompile_limit" in caught.value.remedy
