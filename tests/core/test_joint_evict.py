"""Heads that share a budget: any score, any turn of a conversation, other rules beside, and what is refused.

Caches and answers of the rule of the library are asked of beside the others in test_evict and test_family_evict.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
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
from tokcompile import TokredError
from tokcompile.models import families

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, STEPS = 9, 3
PADS = (0, 3, 22)
"""The last row has 4 real tokens: fewer than the budget."""
ADA = {"rule": "adakv", "budget": BUDGET, "window": 4, "kernel": 3, "pool": "avg"}
SNAP = {"rule": "snapkv", "budget": BUDGET, "window": 4, "kernel": 3}
WORDS = {**greedy(STEPS), "suppress_tokens": [fleet.IMAGE]}
SCORES: dict[str, tuple[str, cached.Score]] = {
    "knorm": ("by: norm, largest: false", cached.smallness),
    "keydiff": ("by: cosine, to: mean, largest: false", cached.difference_to_mean),
    "h2o": ("by: attention_received, queries: all, reduce: sum", partial(cached.mass, reduce="sum")),
    "tova": ("by: attention_received, queries: last, shared: true", partial(cached.votes, window=1)),
}


@contextmanager
def compiled(model: nn.Module, *rules: dict[str, Any], target: str = "eager") -> Iterator[nn.Module]:
    torch._dynamo.reset()
    tokcompile.compile(model, rules=list(rules), target=target)
    try:
        with torch.no_grad():
            yield model
    finally:
        tokcompile.restore(model)


def prompt(name: str = "llama", **how: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and a padded prompt with positions as `generate` counts them."""
    model = fleet.build(name, **how)
    inputs = fleet.example(model, 3, PADS, text=25)
    return model, cached.continued(inputs, inputs["input_ids"][:, :0])


def written(path: Path, score: str, more: str = "", evict: str = "") -> dict[str, Any]:
    """A rule whose heads share a budget by some score."""
    path = path / "shared.yaml"
    path.write_text(f"""
rule: shared
about: Heads share a budget.
steps:
  - score: {{name: scores, at: "decoder.*.cache", {score}}}
  - select: {{name: kept, by: topk, scores: scores, among: all, keep: {BUDGET}, heads: joint, recent: 1{more}}}
  - evict: {{at: "decoder.*.cache", keep: kept{evict}}}
""")
    return {"rule": str(path)}


def stays(
    model: nn.Module,
    inputs: dict[str, Tensor],
    score: Callable[..., cached.Heads],
    joint: cached.Joint,
    budgets: list[int] | None = None,
    **ends: int,
) -> list[list[list[list[int]]]]:
    """By layer, row and head which keys stay."""
    with cached.observed(model) as calls, torch.no_grad():
        model(**inputs)
    real = inputs["attention_mask"].bool().tolist()
    return cached.choices(calls, real, lambda _: score, budgets or [BUDGET] * len(calls), joint, **ends)


def votes_stay(model: nn.Module, inputs: dict[str, Tensor], joint: cached.Joint | None = None) -> list[Tensor]:
    """The same as masks, under ADA."""
    votes = partial(cached.votes, window=4, kernel=3)
    return cached.masks(stays(model, inputs, votes, joint or cached.Joint(), recent=4), inputs["input_ids"].shape[1])


def hidden(model: nn.Module, stay: list[Tensor], inputs: dict[str, Tensor], both: dict[str, Tensor]) -> Tensor:
    """Logits of the whole model for tokens after the prompt, which see of it what stays."""
    tokens = inputs["input_ids"].shape[1]
    with cached.observed(model, stay, tokens), torch.no_grad():
        return model(**both, use_cache=False).logits[:, tokens:]


def question(seed: int = 1, tokens: int = 5, rows: int = 3) -> Tensor:
    return torch.randint(5, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, both: dict[str, Tensor], start: int, end: int, cache: Any) -> Any:
    """A call that gives some tokens of a text alone, with a mask of all so far."""
    own = {name: both[name][:, start:end] for name in ("input_ids", "position_ids")}
    return model(**own, attention_mask=both["attention_mask"][:, :end], past_key_values=cache)


@pytest.mark.parametrize("name", ["knorm", *(pytest.param(n, marks=pytest.mark.slow) for n in SCORES if n != "knorm")])
def test_any_score_chooses_over_all_heads(tmp_path: Path, name: str) -> None:
    text, score = SCORES[name]
    if name == "tova":
        score = _shared
    model, inputs = prompt()
    chosen = stays(model, inputs, score, cached.Joint(Fraction(0)), recent=1)
    if name == "tova":  # equal heads keep equally many
        assert {len(places) for rows in chosen for heads in rows[:2] for places in heads} == {BUDGET}
    with torch.no_grad():
        whole = model(**inputs).past_key_values
    with compiled(model, written(tmp_path, text)):
        out = model(**inputs)
        answer = step(model, cached.continued(inputs, question()), 26, 31, copy.deepcopy(out.past_key_values)).logits
    for layer, full, rows in zip(out.past_key_values.layers, whole.layers, chosen, strict=True):
        cached.check_held(layer, full.keys, full.values, rows, shared=True)
    expected = hidden(model, cached.masks(chosen, 26), inputs, cached.continued(inputs, question()))
    assert difference(answer, expected) <= 2e-5


def _shared(seen: cached.Seen, row: int, places: list[int]) -> cached.Heads:
    """Attention of the last token, mean over all query heads."""
    got = seen.weights[row, :, places[-1]].double().mean(0)
    return [[float(got[j]) for j in places]] * seen.key.shape[1]


@pytest.mark.slow
def test_lengths_may_taper_over_blocks(tmp_path: Path) -> None:
    model, inputs = prompt()
    votes = partial(cached.votes, window=2)
    budgets = cached.pyramid(BUDGET, 2, 4, 3, 26)
    chosen = stays(model, inputs, votes, cached.Joint(Fraction(1, 2), "reserve"), budgets, recent=2)
    rule = written(tmp_path, 'by: attention_received, queries: "last:2"', ", taper: 4, floor: 0.5, floor_by: reserve")
    Path(rule["rule"]).write_text(Path(rule["rule"]).read_text().replace("recent: 1", "recent: 2"))
    both = cached.continued(inputs, question())
    with compiled(model, rule):
        cache = model(**inputs).past_key_values
        assert [layer.keys.shape[2] for layer in cache.layers] == budgets
        got = step(model, both, 26, 31, cache).logits
    assert difference(got, hidden(model, cached.masks(chosen, 26), inputs, both)) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("floor_by", ["blend", "reserve"])
def test_a_floor_of_one_is_a_choice_of_each_head(floor_by: str) -> None:
    model, inputs = prompt()
    both = cached.continued(inputs, question())
    with compiled(model, {**ADA, "floor": 1, "floor_by": floor_by}):
        cache = model(**inputs).past_key_values
        held = copy.deepcopy(cache)
        got = step(model, both, 26, 31, cache).logits
    with compiled(model, SNAP):
        other = model(**inputs).past_key_values
        assert all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            for a, b in zip(held.layers, other.layers, strict=True)
        )
        assert difference(got, step(model, both, 26, 31, other).logits) <= 2e-5


def test_a_question_whose_rows_are_padded_and_one_after_it() -> None:
    """A step's own padding is seen by nobody, in this step and those that follow."""
    model, inputs = prompt()
    stay = votes_stay(model, inputs)
    both = cached.continued(inputs, question(tokens=8))
    both["attention_mask"][1, 26:29] = 0
    both["position_ids"] = (both["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with compiled(model, ADA):
        cache = model(**inputs).past_key_values
        first = step(model, both, 26, 31, cache).logits
        second = step(model, both, 31, 34, cache).logits
    got, expected = torch.cat([first, second], 1), hidden(model, stay, inputs, both)
    real = both["attention_mask"][:, 26:].bool()
    assert difference(got[real], expected[real]) <= 2e-5


@pytest.mark.slow
def test_a_prompt_in_chunks_is_shortened_by_the_first() -> None:
    """What comes later stays whole, and sees what stayed."""
    model, inputs = prompt()
    stay = votes_stay(model, inputs)
    both = cached.continued(inputs, question(tokens=14))
    with compiled(model, ADA):
        cache = model(**inputs).past_key_values
        got = torch.cat([step(model, both, start, start + 7, cache).logits for start in (26, 33)], 1)
    assert {layer.keys.shape[2] for layer in cache.layers} == {BUDGET + 14}
    assert difference(got, hidden(model, stay, inputs, both)) <= 2e-5


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_bfloat16(attention: str) -> None:
    """Which keys stay is decided on the model's own keys, and later logits are near to those with these hidden."""
    model, inputs = prompt(dtype=torch.bfloat16, attention=attention)
    both = cached.continued(inputs, question())
    with torch.no_grad():
        whole = model(**inputs).past_key_values
    with compiled(model, ADA):
        cache = model(**inputs).past_key_values
        owners = [cache._tokcompile_carried[f"owners_{block}"] for block in range(3)]
        rows = [_found(layer, full, own) for layer, full, own in zip(cache.layers, whole.layers, owners, strict=True)]
        got = step(model, both, 26, 31, cache).logits
    assert got.dtype == torch.bfloat16
    assert all(sum(map(len, heads)) == 2 * BUDGET for layer in rows for heads in layer[:2])
    assert any(len(heads[0]) != len(heads[1]) for layer in rows for heads in layer)
    exact = model.float()
    assert difference(got, hidden(exact, cached.masks(rows, 26), inputs, both)) <= 0.05


def _found(layer: Any, full: Any, owners: Tensor) -> list[list[list[int]]]:
    """By row and head the places of the keys that a cache holds, where its owners say whose they are."""
    rows = []
    for row in range(len(owners)):
        heads: list[list[int]] = [[] for _ in range(full.keys.shape[1])]
        for key, head in zip(layer.keys[row].flatten(0, 1), owners[row].flatten().tolist(), strict=True):
            if head >= 0:
                heads[head].append(int((full.keys[row, head] == key).all(-1).int().argmax()))
        rows.append(heads)
    return rows


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    model, inputs = prompt()
    plain = {name: value for name, value in inputs.items() if name != "position_ids"}
    said = []
    for target in ("eager", "inductor"):
        with compiled(model, ADA, target=target):
            said.append(model.generate(**plain, **WORDS))
    assert torch.equal(said[0].sequences, said[1].sequences)
    assert difference(torch.stack(said[0].logits, 1), torch.stack(said[1].logits, 1)) <= 5e-5


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "drop in the middle": ("llava", {"rule": "fastv", "keep": 6, "layer": 1}),
    "drop in front": ("llava", {"rule": "hiprune", "keep": 6}),
    "drop of text": ("llama", {"rule": "random", "among": "all", "keep": 15, "positions": "keep"}),
    "other base": ("llama", {"rule": "rope_scaling"}),
}


@pytest.mark.parametrize(
    "which", ["drop in the middle", *(pytest.param(n, marks=pytest.mark.slow) for n in list(OTHERS)[1:])]
)
def test_other_rules_go_before(which: str) -> None:
    """Under a floor of one, what a choice of each head says after the same rule."""
    name, other = OTHERS[which]
    model = fleet.build(name)
    inputs = fleet.example(model, 2, (0, 3), text=25 if name == "llama" else 9)
    said = []
    for rule in ({**ADA, "floor": 1}, SNAP):
        with compiled(model, other, rule):
            said.append(model.generate(**inputs, **WORDS))
    assert difference(torch.stack(said[0].logits, 1), torch.stack(said[1].logits, 1)) <= 2e-5


@pytest.mark.slow
def test_tokens_put_into_a_padded_prompt_are_refused_in_later_steps() -> None:
    """As they are before a choice of each head."""
    model, inputs = prompt()
    with (
        compiled(model, {"rule": "meta_tokens"}, ADA),
        pytest.raises(Exception, match="what is left of it is not known"),
    ):
        model.generate(**{name: value for name, value in inputs.items() if name != "position_ids"}, **WORDS)


@pytest.mark.slow
def test_a_prompt_shorter_than_the_budget_keeps_all() -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, (0, 3), text=6)
    said = []
    for rules in ([{**ADA, "budget": 20}], [{**SNAP, "budget": 20}]):
        with compiled(model, *rules):
            said.append(model.generate(**inputs, **WORDS))
    assert difference(torch.stack(said[0].logits, 1), torch.stack(said[1].logits, 1)) <= 2e-5


@pytest.mark.slow
def test_one_cached_head_shares_with_nobody() -> None:
    """Falcon's keys of old are of one head: nothing is carried, and a crop is as ever."""
    model = families.decoder("llama", fleet.TEXT | {"num_key_value_heads": 1}).eval()
    inputs = fleet.example(model, 2, (0, 3), text=25)
    with compiled(model, ADA):
        cache = model(**inputs).past_key_values
        assert not hasattr(cache, "_tokcompile_carried")
    with compiled(model, SNAP):
        other = model(**inputs).past_key_values
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, other.layers, strict=True))


@pytest.mark.parametrize(
    ("more", "evict", "match"),
    [
        ("", ", when: both", "later steps cannot evict by this choice"),
        ("", ", when: decode", "later steps cannot evict by this choice"),
        ("", ", positions: rank", "cannot be numbered by rank where heads keep different numbers"),
    ],
)
def test_what_later_steps_could_not_read_is_refused(tmp_path: Path, more: str, evict: str, match: str) -> None:
    model = fleet.build("llama")
    rule = written(tmp_path, "by: norm, largest: false", more, evict)
    with pytest.raises(Exception, match=match) as caught:
        prune(model, **rule)(**fleet.example(model, 2, text=25))
    error = refusal(caught.value)
    assert "joint" in error.found and error.remedy and "shared.yaml" in "".join(error.where)


def test_merges_markers_and_routes_are_refused(tmp_path: Path) -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, text=9)
    for other, match in (({"rule": "pospad", "keep": 5}, "caches with markers"), ({"rule": "tokenselect"}, "evicted")):
        with pytest.raises(Exception, match=match):
            prune(model, rules=[other, ADA])(**inputs)
    rule = written(tmp_path, "by: attention_received", evict=", merged: means")
    path = Path(rule["rule"])
    merge = '  - merge: {name: means, by: likeness, at: "decoder.*.cache", keep: kept, scores: scores}\n  - evict:'
    path.write_text(path.read_text().replace("  - evict:", merge))
    with pytest.raises(Exception, match="cannot be merged where all heads of a block share one budget"):
        prune(model, **rule)(**inputs)


@pytest.mark.parametrize(
    ("select", "match"),
    [
        ("keep: 5, floor: 0.5", "add heads: joint"),
        ("keep: 5, heads: joint, floor: 2", "a number from 0 to 1"),
        ("keep: 5, heads: both", "joint"),
        ("keep: 5, heads: joint, by: pairwise", "by: topk"),
    ],
)
def test_rule_files_that_make_no_sense_are_refused(tmp_path: Path, select: str, match: str) -> None:
    by = "" if "by:" in select else "by: topk, "
    path = tmp_path / "wrong.yaml"
    path.write_text(f"""
rule: wrong
about: Wrong.
steps:
  - score: {{name: scores, by: norm, at: "decoder.*.cache"}}
  - select: {{name: kept, {by}scores: scores, among: all, {select}}}
  - evict: {{at: "decoder.*.cache", keep: kept}}
""")
    with pytest.raises(TokredError, match=match):
        tokcompile.compile(fleet.build("llama"), rule=str(path))


def test_tokens_of_a_sequence_have_no_heads_that_share(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("""
rule: wrong
about: Wrong.
steps:
  - score: {name: scores, by: norm, at: projector.output}
  - select: {name: kept, by: topk, scores: scores, keep: 5, heads: joint}
  - drop: {at: decoder.0.input, keep: kept, positions: compact}
""")
    with pytest.raises(TokredError, match="'heads' belongs to choices among keys of caches"):
        tokcompile.compile(fleet.build("llava"), rule=str(path))


def test_plain_compile_shortens_a_prompt_and_says_who_keeps_what_steps_are_told() -> None:
    model, inputs = prompt()
    model.compile(backend="tokred", options={**ADA, "target": "eager"})
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(Exception, match="which heads its cached keys are of") as caught:
            step(model, cached.continued(inputs, question()), 26, 31, cache)
    assert "tokcompile.compile" in refusal(caught.value).remedy


@pytest.mark.slow
def test_an_exported_prompt_returns_the_caches_of_the_compiled_one() -> None:
    model, inputs = prompt()
    program = tokcompile.rewrite(tokcompile.export(model, inputs), **ADA)
    got, expected = program.module()(**inputs), prune(model, **ADA)(**inputs)
    assert torch.equal(got.logits, expected.logits)
    for one, other in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert one.keys.shape[2] == BUDGET
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
