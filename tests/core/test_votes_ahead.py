"""Tokens behind a prompt that vote which of its keys stay, and leave nothing else behind: against runs by hand."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import difference, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile.errors import RuleError
from tokcompile.kernels import _hash
from tokcompile.rulefile import load_rule

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, COUNT, LEAD, STEPS = 9, 6, 2, 4
PADS = (0, 3, 22)
"""The last row has fewer real tokens than the budget, and fewer than are put in."""


def options(**more: Any) -> dict[str, Any]:
    return {"rule": "dapq", "budget": BUDGET, "count": COUNT, "lead": LEAD, **more}


def prompt(model: nn.Module, pads: tuple[int, ...] = PADS, text: int = 25) -> dict[str, Tensor]:
    """Inputs with the positions that `generate` counts."""
    inputs = fleet.example(model, len(pads), pads, text=text)
    return cached.continued(inputs, inputs["input_ids"][:, :0])


def synthetic(inputs: dict[str, Tensor], content: str, count: int, lead: int) -> Tensor:
    """DapQ (2026): the first tokens of a prompt and then its last, [B, count]."""
    rows = []
    for ids, real in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
        own = ids[real].tolist()
        last = [own[max(len(own) - (count - lead) + i, 0)] for i in range(count - lead)]
        drawn = [int((_hash.hashed(i, 0) >> 8) * 2.0**-24 * 64) for i in range(count)]
        rows.append({"prefix_suffix": own[:lead] + last, "repeat": own[-1:] * count, "random": drawn}[content])
    return torch.tensor(rows)


def extended(inputs: dict[str, Tensor], content: str = "prefix_suffix", count: int = COUNT, lead: int = LEAD) -> Any:
    """The prompt with the tokens behind it, at the positions that follow its own."""
    return cached.continued(inputs, synthetic(inputs, content, count, lead))


def by_hand(
    model: nn.Module, inputs: dict[str, Tensor], budget: int, kernel: int = 1, ends: Any = None, **given: Any
) -> list[list[list[list[int]]]]:
    """The keys that stay: for each layer, row and cached head."""
    tokens = inputs["input_ids"].shape[1]
    more = extended(inputs, **given)
    count = more["input_ids"].shape[1] - tokens
    with cached.observed(model) as calls, torch.no_grad():
        model(**more)
    calls = [call for call in calls if call.query.shape[2] == tokens + count]

    sums = torch.stack([call.weights[:, :, tokens:].sum(-1) for call in calls])
    assert difference(sums, torch.ones_like(sums)) <= 1e-5
    votes = partial(cached.ahead, count=count, kernel=kernel)
    real = inputs["attention_mask"].bool().tolist()
    return cached.choices(calls, real, lambda block: votes, [budget] * len(calls), **(ends or {}))


def check(layers: Any, whole: Any, chosen: list[list[list[list[int]]]], near: float = 0) -> None:
    for layer, full, rows in zip(layers, whole, chosen, strict=True):
        length = layer.keys.shape[2]
        assert length == max(len(places) for heads in rows for places in heads)
        for row, heads in enumerate(rows):
            for head, places in enumerate(heads):
                start = length - len(places)
                assert difference(layer.keys[row, head, start:], full.keys[row, head, places]) <= near
                assert difference(layer.values[row, head, start:], full.values[row, head, places]) <= near


CELLS = {
    "llama": {},
    "llama-random": {"content": "random"},
    "llama-one": {"count": 1, "lead": 0, "budget": 1},
    "llama-long": {"count": 40, "lead": 4},
    "qwen2-repeat": {"content": "repeat", "kernel": 3, "sinks": 1, "recent": 2},
    "llava": {"lead": 1},
    "llama-all": {"budget": "100%"},
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in ("llama-one", "llama-long") else ()) for case in CELLS],
)
def test_caches_hold_the_keys_of_the_run_by_hand(case: str) -> None:
    """The prompt with more tokens behind it is the same prompt: in products of the same sizes, to the last bit."""
    model, given = fleet.build(case.partition("-")[0]), CELLS[case]
    inputs = prompt(model, PADS[: 2 if fleet.images(model) else 3])  # copies of placeholders are no images
    tokens = inputs["input_ids"].shape[1]
    of = {key: given.get(key, usual) for key, usual in (("content", "prefix_suffix"), ("count", COUNT), ("lead", LEAD))}
    with torch.no_grad():
        plain, full = model(**inputs), model(**extended(inputs, **of))
    out = prune(model, **options(**given))(**inputs)
    assert difference(out.logits, full.logits[:, :tokens]) == 0
    assert difference(out.logits, plain.logits) <= 1e-5
    ends = {key: given.get(key, 0) for key in ("sinks", "recent")}
    budget = tokens if given.get("budget") == "100%" else given.get("budget", BUDGET)
    chosen = by_hand(model, inputs, budget, given.get("kernel", 1), ends, **of)
    check(out.past_key_values.layers, full.past_key_values.layers, chosen)
    check(out.past_key_values.layers, plain.past_key_values.layers, chosen, 1e-5)


def test_generate_equals_a_run_that_hides_what_was_evicted() -> None:
    """The first new token has the position after the prompt, whatever was put in and evicted."""
    model = fleet.build("llama")
    inputs = prompt(model)
    tokens = inputs["input_ids"].shape[1]
    stay = cached.masks(by_hand(model, inputs, BUDGET), tokens)
    given = {key: value for key, value in inputs.items() if key != "position_ids"}
    tokcompile.compile(model, target="eager", **options())
    out = model.generate(**given, **greedy(STEPS))
    tokcompile.restore(model)
    assert out.past_key_values.layers[0].keys.shape[2] == BUDGET + STEPS - 1
    more = out.sequences[:, -STEPS:-1]
    with cached.observed(model, stay, tokens), torch.no_grad():
        expected = model(**cached.continued(inputs, more), use_cache=False).logits[:, -STEPS:]
    assert difference(torch.stack(out.logits, 1), expected) <= 2e-5


def test_one_graph_serves_prompts_of_many_lengths() -> None:
    """One graph of the prompt, also of one that is shorter than what is put in."""
    model = fleet.build("llama")
    pruned = prune(model, dynamic=True, **options())
    for text in (25, 4, 13):
        inputs = prompt(model, (0, 3), text)
        with torch.no_grad():
            whole = model(**inputs).past_key_values.layers
        check(pruned(**inputs).past_key_values.layers, whole, by_hand(model, inputs, BUDGET), 1e-5)
    assert len(pruned.report.graphs) == 1


@pytest.mark.slow
def test_a_row_that_is_padded_is_the_row_alone() -> None:
    model = fleet.build("qwen2")
    inputs = prompt(model)
    both = prune(model, **options())(**inputs).past_key_values.layers
    for row, pad in enumerate(PADS):
        torch._dynamo.reset()
        alone = prune(model, **options())(**fleet.row(inputs, row, pad)).past_key_values.layers
        for one, other in zip(both, alone, strict=True):
            real = min(BUDGET, inputs["input_ids"].shape[1] - pad)
            assert difference(one.keys[row, :, -real:], other.keys[0, :, -real:]) <= 1e-5


RULE = """
rule: mine
about: Let tokens behind the prompt vote, or the prompt's own with these there.
steps:
  - insert:
      {name: ahead, at: embedding.output, where: end, count: 4, content: repeat, fresh: follow, cached: false,
       until: head.input}
  - score: {name: votes, by: attention_received, at: "decoder.*.cache", queries: ahead}
  - select: {name: kept, by: topk, scores: votes, among: all, keep: 9, recent: 3}
  - evict: {at: "decoder.*.cache", keep: kept}
"""


def test_the_prompts_own_queries_vote_where_others_are_put_in(tmp_path: Path) -> None:
    """The last three of the prompt, not the last three of all."""
    path = tmp_path / "mine.yaml"
    path.write_text(RULE.replace("queries: ahead", 'queries: "last:3"'))
    model = fleet.build("llama")
    inputs = prompt(model)
    mine = prune(model, rule=str(path))(**inputs).past_key_values.layers
    torch._dynamo.reset()
    snap = prune(model, rule="snapkv", budget=9, window=3, kernel=1)(**inputs).past_key_values.layers
    for one, other in zip(mine, snap, strict=True):
        assert difference(one.keys, other.keys) <= 1e-5 and difference(one.values, other.values) <= 1e-5


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("queries: ahead", "queries: behind", "'queries: behind' of 'score' names no set of tokens"),
        ("queries: ahead", "queries: kept", "'kept' is a selection, and 'queries' of 'score' takes a set of tokens"),
        ('at: "decoder.*.cache", queries', "at: decoder.0.attention, queries", "'queries: ahead' counts at a cache"),
        (",\n       until: head.input", "", "caches without the inserted tokens go on from the old ones alone"),
        ("where: end", "where: front", "only tokens behind the text can follow it"),
        ("fresh: follow", "fresh: count, positions: compact", "caches without the inserted tokens"),
        ("content: repeat", "content: prefix_suffix, lead: -1", "-1 tokens cannot be copied"),
        (
            "at: embedding.output, where: end, count: 4, content: repeat",
            "at: decoder.0.input, where: end, count: 4, content: random",
            "random tokens of the vocabulary",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(old: str, new: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RULE)
    load_rule(path)
    assert old in RULE
    path.write_text(RULE.replace(old, new))
    with pytest.raises(RuleError, match=re.escape(cause)):
        load_rule(path)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("count: 4", "count: 0", "'ahead' inserts no tokens, and so none can vote"),
        ("at: embedding.output", "at: decoder.1.input", "are not there where keys are scored"),
    ],
)
def test_tokens_that_are_not_there_cannot_vote(old: str, new: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RULE.replace(old, new))
    model = fleet.build("llama")
    with pytest.raises(Exception, match=cause) as caught:
        prune(model, rule=str(path))(**prompt(model, (0,)))
    assert refusal(caught.value).remedy


def test_positions_that_are_added_are_those_after_the_prompt_or_not_known() -> None:
    """GPT-2 counts them where the caller gives none; of numbers that he gives nobody knows what they are."""
    model = fleet.build("gpt2")
    ids = prompt(model, (0, 0))["input_ids"]
    ahead = synthetic({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "prefix_suffix", COUNT, LEAD)
    with torch.no_grad():
        full = model(input_ids=torch.cat([ids, ahead], 1)).past_key_values.layers
    out = prune(model, **options())(input_ids=ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check(out.past_key_values.layers, full, by_hand(model, inputs, BUDGET))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="which numbers are positions is not known"):
        prune(model, **options())(**prompt(model, (0, 0)))


def test_a_windows_cache_is_refused() -> None:
    """It would hold the last tokens of all, those that were put in among them."""
    model = fleet.build("gemma2", attention="eager")
    with pytest.raises(Exception, match="by place after tokens were put in"):
        prune(model, **options())(**prompt(model, (0,)))
