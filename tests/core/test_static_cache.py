"""Caches of a fixed size: a prompt fills them with what its rule leaves, and one graph does all later steps."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import difference, greedy
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache

import tokcompile
from tokcompile import TokredError
from tokcompile.backend import Report
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, NEW, PADS = 9, 6, (0, 3, 22)
"""The last row of a batch has fewer tokens than the budget."""
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": BUDGET, "window": 4, "kernel": 3},
    "pyramidkv": {"budget": BUDGET, "window": 2, "kernel": 1, "beta": 4},
    "knorm": {"budget": BUDGET},
    "random_kv": {"budget": BUDGET},
    "ems": {"budget": 12, "window": 4, "recent": 4},
    "dapq": {"budget": BUDGET},
    "fastv": {"layer": 1, "keep": 6},
    "hiprune": {"keep": 6},
    "random": {"keep": 9, "among": "all"},
}
HYBRID = "cohere2"
"""Blocks 0 and 2 attend in a window of 12, as static layers that become full do."""


def rule(name: str, **more: Any) -> dict[str, Any]:
    return {"rule": name, **OPTIONS[name], **more}


@cache
def built(name: str) -> nn.Module:
    return catalogue.family(name).build() if name == HYBRID else fleet.build(name)


@contextmanager
def compiled(model: nn.Module, *rules: dict[str, Any], target: str = "eager", **options: Any) -> Iterator[Report]:
    torch._dynamo.reset()
    report = Report()
    tokcompile.compile(model, rules=list(rules), target=target, report=report, **options)
    try:
        with torch.no_grad():
            yield report
    finally:
        tokcompile.restore(model)


def prompt(model: nn.Module, text: int = 25, pads: tuple[int, ...] = PADS, seed: int = 0) -> dict[str, Tensor]:
    return fleet.example(model, len(pads), pads, text=text, seed=seed)


def words(steps: int = NEW) -> dict[str, Any]:
    return {**greedy(steps), "suppress_tokens": [fleet.IMAGE]}


def same(one: Any, other: Any) -> None:
    """Token for token, and the logits of every step."""
    assert torch.equal(one.sequences, other.sequences)
    assert difference(torch.stack(one.logits), torch.stack(other.logits)) <= 2e-5


def empty(model: nn.Module, slots: int) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=slots)


def phases(report: Report) -> list[str]:
    return [graph[0].phase for graph in report.graphs]


CASES = [
    ("llama", ["snapkv"]),
    ("qwen2", ["pyramidkv"]),
    ("llava", ["fastv"]),
    (HYBRID, ["knorm"]),
    ("llava", ["fastv", "snapkv"]),
    *(
        pytest.param("llama", [name], marks=pytest.mark.slow)
        for name in ("knorm", "random_kv", "ems", "dapq", "random")
    ),
    *(pytest.param("llava", [name], marks=pytest.mark.slow) for name in ("snapkv", "pyramidkv", "hiprune", "random")),
    pytest.param("llava", ["hiprune", "random_kv"], marks=pytest.mark.slow),
    pytest.param(HYBRID, ["pyramidkv"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "rules"), CASES)
def test_generation_is_that_of_a_cache_that_grows(name: str, rules: list[str]) -> None:
    """The buffers have room for what stays and for the new tokens, the last of which no step reads."""
    model = built(name)
    inputs = prompt(model, pads=PADS if name != "llava" else (0, 3, 2))
    given = [rule(each) for each in rules]
    with compiled(model, *given):
        expected = model.generate(**inputs, **words())
    with compiled(model, *given) as report:
        got = model.generate(**inputs, **words(), cache_implementation="static")
    same(got, expected)
    assert isinstance(got.past_key_values, StaticCache)
    grown = [layer.keys.shape for layer in expected.past_key_values.layers]
    sliding = [layer.is_sliding for layer in got.past_key_values.layers]
    held = [layer.keys.shape for layer in got.past_key_values.layers]
    assert [h for h, s in zip(held, sliding, strict=True) if not s] == [
        g for g, s in zip(grown, sliding, strict=True) if not s
    ]
    assert phases(report)[0] == "prefill" and set(phases(report)[1:]) == {"decode"}


@pytest.mark.parametrize(
    ("text", "pads", "steps"),
    [
        (7, (0, 3), 9),  # the windows get full on the way
        (25, (0, 14), 3),  # they are full from the start; they see padding yet
        pytest.param(3, (0, 1), 3, marks=pytest.mark.slow),  # they are never full
    ],
)
def test_windows_keep_what_theirs_do(text: int, pads: tuple[int, ...], steps: int) -> None:
    model = built(HYBRID)
    inputs = prompt(model, text, pads)
    with compiled(model, rule("knorm")):
        expected = model.generate(**inputs, **words(steps))
    with compiled(model, rule("knorm")) as report:
        got = model.generate(**inputs, **words(steps), cache_implementation="static")
    same(got, expected)
    assert len(report.graphs) <= 5  # windows count on the host, and full ones are others than those that are not


@pytest.mark.slow
def test_windows_are_as_long_as_they_are_in_a_cache_that_a_caller_makes_short() -> None:
    model = built(HYBRID)
    inputs = prompt(model, pads=(0, 14))
    with compiled(model, rule("knorm")):
        expected = model.generate(**inputs, **words(2))
    held = empty(model, BUDGET + 2)  # less than a window
    with compiled(model, rule("knorm")):
        got = model.generate(**inputs, **words(2), past_key_values=held)
    same(got, expected)
    assert [layer.keys.shape[2] for layer in held.layers] == [12, BUDGET + 2] * 2


def test_compacted_positions_of_two_drops() -> None:
    """Blocks 0, 1 and 2 hold different numbers of the prompt's tokens, and keys are evicted beside."""
    model = built("llava")
    inputs = prompt(model, pads=(0, 3))
    rules = [rule("hiprune", positions="compact"), rule("fastv", keep=3)]
    with compiled(model, *rules):
        expected = model.generate(**inputs, **words())
    with compiled(model, *rules):
        got = model.generate(**inputs, **words(), cache_implementation="static")
    same(got, expected)
    counts = [layer.keys.shape[2] for layer in got.past_key_values.layers]
    assert counts[0] > counts[1]


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_one_graph_does_all_steps_in_place(name: str) -> None:
    """However many tokens follow, no graph is compiled anew and no buffer moves."""
    model = built("llama")
    inputs = cached.continued(prompt(model), torch.zeros(3, 0, dtype=torch.long))
    held = empty(model, 2 * BUDGET + 12)
    with compiled(model, rule(name)) as report:
        model(**inputs, past_key_values=held)
        places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in held.layers]
        counts = [int(layer.cumulative_length) for layer in held.layers]
        more = torch.zeros(3, 0, dtype=torch.long)
        for step in range(12):
            more = torch.cat([more, torch.full((3, 1), 7 + step)], 1)
            whole = cached.continued(prompt(model), more)
            out = model(
                input_ids=more[:, -1:],
                attention_mask=whole["attention_mask"],
                position_ids=whole["position_ids"][:, -1:],
                past_key_values=held,
            )
            assert out.past_key_values is held
    assert phases(report) == ["prefill", "decode"]
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in held.layers] == places
    assert [int(layer.cumulative_length) for layer in held.layers] == [count + 12 for count in counts]


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_a_cache_that_a_caller_makes_is_used_as_it_is(name: str) -> None:
    """Shorter than the prompt: of as many bytes as the budget and the new tokens take."""
    model = built("llama")
    inputs = prompt(model)
    largest = {"snapkv": BUDGET, "pyramidkv": 14}[name]
    held = empty(model, largest + NEW)
    with compiled(model, rule(name)):
        expected = model.generate(**inputs, **words())
        got = model.generate(**inputs, **words(), past_key_values=held)
    same(got, expected)
    of_token = 3 * model.config.num_key_value_heads * 16 * 4  # rows, heads, numbers of a head, bytes
    for layer in held.layers:
        assert layer.keys.untyped_storage().nbytes() == (largest + NEW) * of_token
        assert layer.values.untyped_storage().nbytes() == (largest + NEW) * of_token
    assert largest + NEW < inputs["input_ids"].shape[1]


def test_empty_slots_are_never_seen() -> None:
    model = built("llama")
    inputs = cached.continued(prompt(model), torch.zeros(3, 0, dtype=torch.long))
    more = torch.full((3, 4), 7)
    with compiled(model, rule("pyramidkv")):
        logits = []
        for poison in (0.0, 1e3):
            held = empty(model, 40)
            model(**inputs, past_key_values=held)
            for layer in held.layers:
                count = int(layer.cumulative_length)
                layer.keys[:, :, count:] = poison
                layer.values[:, :, count:] = poison
            logits += [_asked(model, held, prompt(model), more[:, :1]), _asked(model, held, prompt(model), more, 1)]
    assert torch.equal(logits[0], logits[2]) and torch.equal(logits[1], logits[3])


def _asked(model: nn.Module, held: Any, inputs: dict[str, Tensor], more: Tensor, before: int = 0) -> Tensor:
    """Logits of tokens that follow a prompt and some tokens more."""
    said = torch.full((more.shape[0], before), 7)
    whole = cached.continued(inputs, torch.cat([said, more], 1))
    return model(
        input_ids=more,
        attention_mask=whole["attention_mask"],
        position_ids=whole["position_ids"][:, -more.shape[1] :],
        past_key_values=held,
    ).logits


@pytest.mark.parametrize("name", ["snapkv", pytest.param("pyramidkv", marks=pytest.mark.slow)])
def test_a_question_of_several_tokens_sees_what_stays(name: str) -> None:
    """Against the whole model under masks of what naive choices keep; two questions, each from a copy of the cache."""
    model = built("llama")
    inputs = cached.continued(prompt(model, pads=(0, 3)), torch.zeros(2, 0, dtype=torch.long))
    tokens, options = inputs["input_ids"].shape[1], OPTIONS[name]
    with cached.observed(model) as calls, torch.no_grad():
        model(**inputs)
    budgets = [BUDGET] * len(calls)
    if name == "pyramidkv":
        budgets = cached.pyramid(BUDGET, 2, 4, len(calls), tokens)
    votes = partial(cached.votes, window=options["window"], kernel=options["kernel"])
    real = inputs["attention_mask"].bool().tolist()
    stay = cached.masks(cached.choices(calls, real, lambda _: votes, budgets, recent=options["window"]), tokens)
    questions = [torch.randint(5, 60, (2, 5), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    expected = []
    for more in questions:
        with cached.observed(model, stay, tokens), torch.no_grad():
            whole = model(**cached.continued(inputs, more), use_cache=False)
        expected.append(whole.logits[:, tokens:])
    with compiled(model, rule(name)):
        held = empty(model, max(budgets) + 5)
        model(**inputs, past_key_values=held)
        got = [_asked(model, copy.deepcopy(held), prompt(model, pads=(0, 3)), more) for more in questions]
    for one, other in zip(got, expected, strict=True):
        assert difference(one, other) <= 2e-5


def test_a_turn_goes_on_with_generate() -> None:
    model = built("llama")
    inputs = prompt(model)
    question = torch.randint(5, 60, (3, 4), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW + 4, dtype=torch.long)], 1)
    answers = []
    for held in (DynamicCache(config=model.config), empty(model, BUDGET + NEW + 4 + NEW)):
        with compiled(model, rule("snapkv")):
            first = model.generate(**inputs, **words(), past_key_values=held)
            new = torch.cat([first.sequences[:, -1:], question], 1)
            answers.append(model.generate(input_ids=new, attention_mask=mask, past_key_values=held, **words()))
    with compiled(model, rule("snapkv")):
        with pytest.raises(TokredError, match="does not say which tokens") as caught:
            model.generate(
                input_ids=torch.cat([first.sequences, question], 1),
                attention_mask=mask,
                past_key_values=held,
                **words(),
            )
        assert "new tokens alone" in caught.value.remedy
    same(answers[1], answers[0])


@pytest.mark.slow
def test_calls_in_a_row_share_the_graph_of_their_steps() -> None:
    """Texts of other lengths, of which each leaves as much; the room behind them is the largest that was asked for."""
    model = built("llama")
    texts = [prompt(model, 25), prompt(model, 30, seed=1), prompt(model, 25, (0, 1, 2), seed=2)]
    with compiled(model, rule("snapkv")):
        expected = [model.generate(**each, **words()) for each in texts]
    with compiled(model, rule("snapkv")) as report:
        got = [model.generate(**each, **words(), cache_implementation="static") for each in texts]
    for one, other in zip(got, expected, strict=True):
        same(one, other)
    assert phases(report).count("decode") == 1
    assert {layer.keys.shape[2] for out in got for layer in out.past_key_values.layers} == {BUDGET + NEW - 1}


def test_a_cache_that_was_reset_is_filled_anew() -> None:
    model = built("llama")
    first, second = prompt(model), prompt(model, 30, seed=1)
    held = empty(model, BUDGET + NEW)
    with compiled(model, rule("snapkv")) as report:
        expected = model.generate(**second, **words())
        model.generate(**first, **words(), past_key_values=held)
        place = held.layers[0].keys.data_ptr()
        graphs = len(report.graphs)
        held.reset()
        got = model.generate(**second, **words(), past_key_values=held)
        assert held.layers[0].keys.data_ptr() == place
        assert "decode" not in phases(report)[graphs:]
    same(got, expected)


def test_beams_take_their_numbers_along() -> None:
    model = built("llama")
    inputs = prompt(model)
    beams = {**words(), "num_beams": 3, "num_return_sequences": 2}
    with compiled(model, rule("snapkv")):
        expected = model.generate(**inputs, **beams)
    with compiled(model, rule("snapkv")):
        got = model.generate(**inputs, **beams, cache_implementation="static")
    same(got, expected)


def test_a_prompt_in_chunks_is_that_of_a_cache_that_grows() -> None:
    """A rule evicts from the first chunk alone; `generate` makes the buffers before it."""
    model = built("llama")
    inputs = prompt(model, 25, (0, 3))
    with compiled(model, rule("knorm")):
        expected = model.generate(**inputs, **words(), prefill_chunk_size=13)
    with compiled(model, rule("knorm")):
        got = model.generate(**inputs, **words(), prefill_chunk_size=13, cache_implementation="static")
    same(got, expected)
    assert {int(layer.cumulative_length) for layer in got.past_key_values.layers} == {BUDGET + 13 + NEW - 1}


def test_a_compiled_model_is_not_compiled_once_more() -> None:
    """As `generate` does by itself on a GPU."""
    model = built("llama")
    inputs = prompt(model)
    again = CompileConfig(backend="eager")
    again._compile_all_devices = True
    with compiled(model, rule("snapkv")) as report:
        expected = model.generate(**inputs, **words())
        got = model.generate(**inputs, **words(), cache_implementation="static", compile_config=again)
        assert not hasattr(model, "_compiled_call")
        assert model.get_compiled_call(None) == model.__call__
    same(got, expected)
    assert phases(report).count("decode") <= 3  # two of the cache that grows, one of the other
    assert "get_compiled_call" not in vars(model) and "create_masks_for_generate" not in vars(model)


@pytest.mark.slow
def test_inductor() -> None:
    model = built("llama")
    inputs = prompt(model)
    with compiled(model, rule("pyramidkv"), target="inductor"):
        expected = model.generate(**inputs, **words())
        got = model.generate(**inputs, **words(), cache_implementation="static")
    same(got, expected)


def test_a_cache_that_is_too_small_is_refused() -> None:
    model = built("llama")
    inputs = prompt(model)
    with compiled(model, rule("snapkv")):
        with pytest.raises(TokredError, match="too small for what a prompt leaves") as caught:
            model(**inputs, past_key_values=empty(model, BUDGET - 1))
        assert (
            caught.value.found == f"{BUDGET - 1} slots, and {BUDGET} tokens" and "max_cache_len" in caught.value.remedy
        )
        with pytest.raises(TokredError, match="a static cache is full") as caught:
            model.generate(**inputs, **words(), past_key_values=empty(model, BUDGET + NEW - 2))
        assert f"{NEW - 2} fit behind it" in caught.value.found


def test_a_cache_for_another_batch_is_refused() -> None:
    model = built("llama")
    held = empty(model, 40)
    with compiled(model, rule("snapkv")):
        model(**prompt(model), past_key_values=held)
        held.reset()
        with pytest.raises(TokredError, match="do not fit what a prompt leaves"):
            model(**prompt(model, pads=(0, 3)), past_key_values=held)


def test_a_step_that_dynamo_leaves_to_the_model_is_refused() -> None:
    """At its limit of graphs it runs the model as it is, which sees empty slots."""
    model = built("llama")
    with (
        compiled(model, rule("snapkv")),
        torch._dynamo.config.patch(recompile_limit=1),
        pytest.raises(TokredError, match="was not compiled") as caught,
    ):
        model.generate(**prompt(model), **words(), cache_implementation="static")
    assert "recompile_limit" in caught.value.remedy


def test_a_cache_that_something_else_filled_is_refused() -> None:
    model = built("llama")
    inputs, held = prompt(model), empty(model, 40)
    with torch.no_grad():
        model(**inputs, past_key_values=held)
    with (
        compiled(model, rule("snapkv")),
        pytest.raises(TokredError, match="no prompt of this compiled model") as caught,
    ):
        model(**inputs, past_key_values=held)
    assert "cache.reset()" in caught.value.remedy


def test_a_step_that_does_not_say_where_it_stands_is_refused() -> None:
    model = built("llama")
    inputs, held = prompt(model), empty(model, 40)
    one = torch.full((3, 1), 7)
    mask = torch.ones(3, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
    with compiled(model, rule("snapkv")):
        model(**inputs, past_key_values=held)
        with pytest.raises(TokredError, match="does not say which tokens") as caught:
            model(input_ids=one, attention_mask=mask, past_key_values=held)
        assert "position_ids" in caught.value.found
        where = {"position_ids": torch.full((3, 1), 26), "past_key_values": held}
        with pytest.raises(TokredError, match="does not say which tokens"):
            model(input_ids=one, attention_mask=mask[:, 1:], **where)
        mask[1, -1] = 0
        with pytest.raises(RuntimeError, match="padding among the new tokens"):
            model(input_ids=one, attention_mask=mask, **where)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"rule": "h2o", "budget": BUDGET, "recent": 3}, "when: both"),
        ({"rule": "tokenselect"}, "'route'"),
        ({"rule": "rope_scaling", "factor": 2.0}, "'rotate'"),
        ({"rule": "meta_tokens"}, "tokens that are put into a text"),
    ],
)
def test_rules_that_need_to_know_more_of_a_cache_are_refused(given: dict[str, Any], why: str) -> None:
    model = built("llama")
    with compiled(model, given), pytest.raises(TokredError, match="does not go with a static cache") as caught:
        model.generate(**prompt(model), **words(), cache_implementation="static")
    assert why in caught.value.found and "DynamicCache" in caught.value.remedy


def test_drops_before_windows_are_refused() -> None:
    model = built(HYBRID)
    with compiled(model, rule("random", positions="keep")), pytest.raises(TokredError) as caught:
        model.generate(**prompt(model), **words(), cache_implementation="static")
    assert "layers with a window" in caught.value.found


def test_an_encoder_decoder_is_refused() -> None:
    family = catalogue.family("bart")
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    with compiled(model, rule("knorm")), pytest.raises(TokredError, match="cannot fill this static cache") as caught:
        model.generate(
            input_ids=inputs["input_ids"], max_new_tokens=3, eos_token_id=None, cache_implementation="static"
        )
    assert "DynamicCache" in caught.value.remedy
