"""evict at every later step: what caches hold and what tokens come out, against attention on lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fleet
import pytest
import streamed
import torch
from cached import continued
from harness import check_rows_alone, difference, greedy, prune, refusal
from streamed import WAVES, Policy, best, by_turns
from torch import Tensor, nn

import tokcompile
from tokcompile.backend import Report
from tokcompile.models import catalogue, families

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, STEPS = 9, 8
PADS = (0, 3, 22)
"""The last row has fewer real tokens than the budget, and reaches it while it goes on."""
RULES: dict[str, tuple[dict[str, Any], Policy]] = {
    "streamingllm": ({"sinks": 2}, Policy(streamed.age, best(BUDGET, sinks=2), waves=WAVES)),
    "streamingllm-keep": ({"sinks": 2, "positions": "keep"}, Policy(streamed.age, best(BUDGET, sinks=2))),
    "streamingllm-prefill": (
        {"sinks": 2, "when": "prefill"},
        Policy(streamed.age, best(BUDGET, sinks=2), later=False, waves=WAVES),
    ),
    "streamingllm-decode": (
        {"sinks": 2, "when": "decode"},
        Policy(streamed.age, best(BUDGET, sinks=2), prompt=False, waves=WAVES),
    ),
    "tova": ({}, Policy(streamed.newest_alone, best(BUDGET, recent=1), shared=True)),
    "h2o": ({"recent": 4}, Policy(streamed.total, best(BUDGET, recent=4))),
    "h2o-decode": ({"recent": 3, "when": "decode"}, Policy(streamed.total, best(BUDGET, recent=3), prompt=False)),
    "h2o-prefill": ({"recent": 3, "when": "prefill"}, Policy(streamed.total, best(BUDGET, recent=3), later=False)),
    "h2o-seen": (
        {"recent": 2, "sinks": 1, "reduce": "seen"},
        Policy(streamed.mean, best(BUDGET, sinks=1, recent=2)),
    ),
    "knorm": ({"when": "both"}, Policy(streamed.smallness, best(BUDGET))),
    "keydiff": ({"when": "decode", "recent": 2}, Policy(streamed.unlike_mean, best(BUDGET, recent=2), prompt=False)),
    "treekv": (
        {"sinks": 1, "recent": 3, "window": 6, "positions": "keep"},
        Policy(streamed.mean, by_turns(BUDGET, sinks=1, recent=3), window=6),
    ),
    "treekv-shared": (
        {"sinks": 0, "recent": 0, "window": 40, "shared": True},
        Policy(streamed.mean, by_turns(BUDGET), shared=True, waves=WAVES),
    ),
}
CELLS = [
    pytest.param(rule, model, marks=() if model == "llama" or (rule, model) in EXTRA else (pytest.mark.slow,))
    for EXTRA in [{("streamingllm", "llava"), ("streamingllm-keep", "gpt2"), ("h2o", "opt")}]
    for rule in RULES
    for model in ("llama", "qwen2", "gpt2", "opt", "llava")
    if not (RULES[rule][1].waves is not None and model in ("gpt2", "opt"))
]


def options(rule: str, budget: Any = BUDGET) -> dict[str, Any]:
    return {"rule": rule.partition("-")[0], "budget": budget, **RULES[rule][0]}


def by_hand(
    rule: str, model: nn.Module, inputs: dict[str, Tensor], more: Tensor
) -> tuple[Tensor, list[streamed.Layer]]:
    """Logits of the last prompt token and those that follow, and what caches hold in the end."""
    both, prompt = continued(inputs, more), inputs["input_ids"].shape[1]
    real = both["attention_mask"].bool()
    policy = rule if isinstance(rule, Policy) else RULES[rule][1]
    with streamed.streamed(model, policy, prompt, real) as left, torch.no_grad():
        logits = model(**both, use_cache=False).logits[:, prompt - 1 :]
    return logits, left


def check_caches(cache: Any, left: list[streamed.Layer]) -> None:
    """Caches hold what is left, with padding in front of shorter rows."""
    for layer, by_hand in zip(cache.layers, left, strict=True):
        length = layer.keys.shape[2]
        assert length == max(len(places) for heads in by_hand.stay for places in heads)
        for row, heads in enumerate(by_hand.stay):
            for head, places in enumerate(heads):
                start = length - len(places)
                assert difference(layer.keys[row, head, start:], by_hand.key[row, head, places]) <= 2e-5
                assert difference(layer.values[row, head, start:], by_hand.value[row, head, places]) <= 2e-5


@pytest.mark.parametrize(("rule", "name"), CELLS)
def test_generate_equals_attention_on_lists(rule: str, name: str) -> None:
    model = fleet.build(name)
    inputs = fleet.example(model, 3, PADS, text=25)
    tokcompile.compile(model, target="eager", **options(rule))
    # A token that comes twice has two keys of one norm in the first layer.
    out = model.generate(**inputs, **greedy(STEPS), suppress_tokens=[fleet.IMAGE], no_repeat_ngram_size=1)
    tokcompile.restore(model)
    more = out.sequences[:, -STEPS:-1]
    expected, left = by_hand(rule, model, inputs, more)
    assert difference(torch.stack(out.logits, 1), expected) <= 2e-5
    longest = BUDGET + (0 if RULES[rule][1].later else STEPS - 1)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {longest}
    if not (
        RULES[rule][1].waves is not None and RULES[rule][0].get("when") == "prefill"
    ):  # keys that are handed back turned
        check_caches(out.past_key_values, left)


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_plain_compile_serves_scores_that_remember_nothing(target: str) -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, text=25)
    model.compile(backend="tokred", options={**options("streamingllm-keep"), "target": target})
    out = model.generate(**inputs, **greedy(STEPS))
    model._compiled_call_impl = None
    expected, left = by_hand("streamingllm-keep", model, inputs, out.sequences[:, -STEPS:-1])
    assert difference(torch.stack(out.logits, 1), expected) <= 2e-5
    check_caches(out.past_key_values, left)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["h2o-seen", "treekv", "tova"])
def test_inductor_computes_the_same(rule: str) -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 3, PADS, text=25)
    tokcompile.compile(model, target="inductor", **options(rule))
    out = model.generate(**inputs, **greedy(STEPS))
    tokcompile.restore(model)
    expected, left = by_hand(rule, model, inputs, out.sequences[:, -STEPS:-1])
    assert difference(torch.stack(out.logits, 1), expected) <= 5e-5
    check_caches(out.past_key_values, left)


@pytest.mark.parametrize(
    ("rule", "what"), [("h2o", "what its prompt's queries saw"), ("streamingllm", "where its cached keys stood")]
)
def test_plain_compile_says_who_keeps_what_steps_are_told(rule: str, what: str) -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=25)
    model.compile(backend="tokred", options={**options(rule), "target": "eager"})
    with pytest.raises(Exception, match=what) as caught:
        model.generate(**inputs, **greedy(2))
    model._compiled_call_impl = None
    assert "tokcompile.compile" in refusal(caught.value).remedy


def test_a_full_cache_stays_one_shape_and_one_graph() -> None:
    model = fleet.build("llama")
    report = Report()
    tokcompile.compile(model, target="eager", report=report, **options("streamingllm"))
    model.generate(**fleet.example(model, 2, text=25), **greedy(4))
    graphs = len(report.graphs)
    out = model.generate(**fleet.example(model, 2, text=25), **greedy(24))
    tokcompile.restore(model)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {BUDGET}
    assert graphs == len(report.graphs) <= 3


@pytest.mark.parametrize("rule", ["streamingllm", "h2o"])
def test_a_prompt_in_chunks_is_shortened_chunk_by_chunk(rule: str) -> None:
    """Later chunks see what is left of the earlier ones, and the cache never holds more than the budget and a chunk."""
    model = fleet.build("llama")
    ids = torch.randperm(60, generator=torch.Generator().manual_seed(2))[:36][None] + 4
    tokcompile.compile(model, target="eager", **options(rule))
    cache, chunk = None, 12
    for start in range(0, 36, chunk):
        positions = torch.arange(start, start + chunk)[None]
        with torch.no_grad():
            out = model(input_ids=ids[:, start : start + chunk], position_ids=positions, past_key_values=cache)
        cache = out.past_key_values
        assert {layer.keys.shape[2] for layer in cache.layers} == {BUDGET}
    tokcompile.restore(model)
    expected, left = in_chunks(rule, model, ids, chunk)
    assert difference(out.logits, expected) <= 2e-5
    check_caches(cache, left)


def in_chunks(rule: str, model: nn.Module, ids: Tensor, chunk: int) -> tuple[Tensor, list[streamed.Layer]]:
    real = torch.ones_like(ids).bool()
    with streamed.streamed(model, RULES[rule][1], chunk, real, chunk) as left, torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -chunk:], left


def test_a_share_is_of_the_prompt() -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, text=25)
    tokcompile.compile(model, target="eager", **options("streamingllm", "1/2"))
    out = model.generate(**inputs, **greedy(STEPS))
    tokcompile.restore(model)
    assert {layer.keys.shape[2] for layer in out.past_key_values.layers} == {inputs["input_ids"].shape[1] // 2}


@pytest.mark.parametrize("then", ["h2o", pytest.param("streamingllm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [{"rule": "hiprune", "keep": 6}, {"rule": "fastv", "layer": 1, "keep": 5}])
def test_generate_after_a_drop_is_each_row_alone(first: dict[str, Any], then: str) -> None:
    """Padding and lost keys, which no mask tells after a drop, are counted on at every step."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (0, 5), text=9)
    rules = [first, options(then, 12)]
    both = check_rows_alone(model, rules, inputs, (0, 5), STEPS)
    assert {layer.keys.shape[2] for layer in both.past_key_values.layers} == {12}


def test_beams_take_what_is_added_up_along() -> None:
    """Each beam goes on from the sums of the beam that it came from: as if its tokens were given one by one."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=25)
    tokcompile.compile(model, target="eager", **options("h2o"))
    found = model.generate(
        **inputs, num_beams=3, max_new_tokens=STEPS, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    tokcompile.restore(model)
    more = found.sequences[:, inputs["input_ids"].shape[1] :]
    logits, _ = by_hand("h2o", model, inputs, more[:, :-1])
    chances = logits.log_softmax(-1).gather(2, more[..., None]).sum()
    assert difference(chances / STEPS, found.sequences_scores[0]) <= 2e-5


WRONG = {
    "among": ({"scores": "by: norm"}, {"among": "image"}, "both", "among: image"),
    "taper": ({"scores": "by: norm"}, {"among": "all", "taper": 2}, "both", "taper: 2"),
    "share": ({"scores": "by: norm"}, {"among": "all", "keep": 0.5}, "decode", "keep: 0.5"),
    "joined": ({"scores": "by: joined, scores: [one]"}, {"among": "all"}, "both", "by: joined"),
    "pairs": ({"scores": "by: norm"}, {"among": "all", "by": "pairwise"}, "decode", "by: pairwise"),
    "luck": ({"scores": "by: random"}, {"among": "all"}, "both", "an eviction at later steps"),
    "largest head": ({"scores": "by: attention_received, heads: max"}, {"among": "all"}, "both", "heads: max"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_later_steps_cannot_do_is_refused_at_the_prompt(name: str, tmp_path: Any) -> None:
    score, choice, when, found = WRONG[name]
    fields = ", ".join(f"{k}: {v}" for k, v in {"by": "topk", "keep": 5, **choice}.items())
    path = tmp_path / "wrong.yaml"
    path.write_text(f"""
rule: wrong
about: Cannot be done.
steps:
  - score: {{name: one, by: norm, at: "decoder.*.cache"}}
  - score: {{name: sizes, {score["scores"]}, at: "decoder.*.cache"}}
  - select: {{name: kept, scores: sizes, {fields}}}
  - evict: {{at: "decoder.*.cache", keep: kept, when: {when}}}
""")
    model = fleet.build("llava")
    with pytest.raises(Exception, match="wrong.yaml") as caught:
        prune(model, rule=str(path))(**fleet.example(model, 1, text=9))
    assert found in refusal(caught.value).found


def test_prompts_of_many_lengths_cannot_share_a_graph_of_pairs() -> None:
    model = fleet.build("llama")
    with pytest.raises(Exception, match="pairs are compared one after the other") as caught:
        prune(model, dynamic=True, **options("treekv"))(**fleet.example(model, 1, text=25))
    assert "dynamic=False" in refusal(caught.value).remedy


@pytest.mark.parametrize("rule", ["streamingllm-keep", "h2o"])
def test_tokens_that_had_a_say_cannot_be_taken_back(rule: str) -> None:
    """One of these caches carries sums, the other carries nothing."""
    model = fleet.build("llama")
    tokcompile.compile(model, target="eager", **options(rule))
    cache = model.generate(**fleet.example(model, 1, text=25), **greedy(2)).past_key_values
    tokcompile.restore(model)
    with pytest.raises(tokcompile.TokredError, match="cannot be cropped"):
        cache.crop(-1)


def test_ranks_need_cached_keys_that_attention_reads() -> None:
    """These caches hold latents, of which keys are made and a part is turned."""
    model = catalogue.family("deepseek_v3").build().eval()
    with pytest.raises(Exception, match="streamingllm.yaml") as caught:
        prune(model, **options("streamingllm"))(input_ids=torch.arange(5, 30)[None])
    assert "pairs" in refusal(caught.value).cause


@pytest.mark.parametrize("when", ["prefill", "both"])
def test_ranks_need_positions_that_turn_keys(when: str) -> None:
    model = fleet.build("gpt2")
    with pytest.raises(Exception, match="cannot have their ranks as positions") as caught:
        prune(model, **options("streamingllm") | {"when": when})(**fleet.example(model, 1, text=25))
    assert refusal(caught.value).remedy == "positions: keep"


def test_ranks_of_keys_whose_rotation_also_scales() -> None:
    """Yarn has frequencies of its own, and multiplies cosines and sines: turned keys stay as long as they are."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = families.decoder("llama", fleet.TEXT | {"rope_parameters": scaling}).eval()
    inputs = fleet.example(model, 3, PADS, text=25)
    tokcompile.compile(model, target="eager", **options("streamingllm"))
    out = model.generate(**inputs, **greedy(STEPS))
    tokcompile.restore(model)
    rotary = model.model.rotary_emb
    assert rotary.attention_scaling != 1
    policy = replace(RULES["streamingllm"][1], waves=rotary.inv_freq.double())
    expected, left = by_hand(policy, model, inputs, out.sequences[:, -STEPS:-1])
    assert difference(torch.stack(out.logits, 1), expected) <= 2e-5
    check_caches(out.past_key_values, left)
