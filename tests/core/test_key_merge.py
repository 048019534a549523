"""merge, at caches: what a prompt's caches hold, and what later steps then say, against runs by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import difference, greedy, prune, refusal
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

import tokcompile
from tokcompile.errors import RuleError
from tokcompile.models.catalogue import families
from tokcompile.rulefile import load_rule

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, WINDOW, STEPS = 12, 4, 4
PADS = (0, 3, 22)
"""The last row has fewer real tokens than the budget."""
Merged = list[list[list[tuple[int, list[int], Tensor, Tensor]]]]
"""For each layer, row and head: the place of each token that stays, those merged into it, its key and its value."""


def options(**more: Any) -> dict[str, Any]:
    return {"rule": "ems", "budget": BUDGET, "window": WINDOW, "alike": 0.1, **more}


def plain_keys(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """[B, Hkv, T, D] of each layer, before they are turned."""
    found: list[Tensor] = []
    heads = model.config.num_key_value_heads

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        found.append(out.unflatten(-1, (heads, -1)).transpose(1, 2))

    hooks = [layer.self_attn.k_proj.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def cosine(x: Tensor, y: Tensor) -> float:
    return max(float(torch.cosine_similarity(x.double(), y.double(), dim=0)), 0.0)


def scores_of(weights: Tensor, window: int, combine: str) -> list[float]:
    """EMS: attention [heads, T, T] of one group, the mean over its heads; the mean of what all gave is aligned."""
    tokens = weights.shape[1]
    everywhere = weights.double().sum(1).mean(0)
    lately = weights.double()[:, -window:].sum(1).mean(0)
    up = max(tokens - window, 0)
    factor = float(lately[:up].mean() / everywhere[:up].mean()) if up else 1.0
    pairs = zip((everywhere * factor).tolist(), lately.tolist(), strict=True)
    return [max(pair) if combine == "max" else sum(pair) for pair in pairs]


def attention_twice(seen: cached.Seen, row: int, places: list[int]) -> cached.Heads:
    """Numbers of a row's real tokens for each head."""
    return [scores_of(group[:, places][:, :, places], WINDOW, "max") for group in cached.groups(seen, row)]


def of_head(
    scores: list[float],
    keys: Tensor,
    plain: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    budget: int = BUDGET,
    alike: float = 0.1,
    spare: float = 0.05,
    merge_keys: bool = True,
) -> list[tuple[int, list[int], Tensor, Tensor]]:
    """One head: [T, D] keys as cached and as they are compared, and the tables that turn a mean at a place."""
    tokens = len(scores)
    chosen = cached.kept(scores, budget, recent=WINDOW)
    up = range(max(tokens - WINDOW, 0))
    centres = [j for j in chosen if j in up]
    total, so_far, lost = sum(scores[j] for j in up), 0.0, set()
    for j in sorted(up, key=lambda j: scores[j]):
        so_far += scores[j]
        if so_far > spare * total:
            break
        lost.add(j)
    members = {c: [c] for c in chosen}
    for j in up:
        if j in chosen or j in lost:
            continue
        likeness = [cosine(plain[j], plain[c]) * cosine(value[j], value[c]) for c in centres]
        if centres and max(likeness) >= alike:
            members[centres[likeness.index(max(likeness))]].append(j)
    out = []
    for c in chosen:
        group = members[c]
        mean = [sum(scores[j] * x[j].double() for j in group) / sum(scores[j] for j in group) for x in (plain, value)]
        key = mean[0].float()
        if tables is not None:
            key = key * tables[0][c] + rotate_half(key) * tables[1][c]
        key, mixed = (key, mean[1].float()) if len(group) > 1 else (keys[c], value[c])
        out.append((c, group, key if merge_keys else keys[c], mixed))
    return out


def by_hand(
    model: nn.Module, inputs: dict[str, Tensor], space: str = "plain", combine: str = "max", **more: Any
) -> Merged:
    """The caches that stay; places are those in the row, padding counted."""
    with cached.observed(model) as calls, torch.no_grad():
        model(**inputs)
    turns = space == "plain" and hasattr(model.model if hasattr(model, "model") else model, "rotary_emb")
    plain = plain_keys(model, inputs) if turns else [call.key for call in calls]
    tables = model.model.rotary_emb(calls[0].value, inputs["position_ids"]) if turns else None
    out: Merged = []
    for call, bare in zip(calls, plain, strict=True):
        rows = []
        for row, real in enumerate(inputs["attention_mask"].bool().tolist()):
            places, heads = [j for j, here in enumerate(real) if here], []
            for head, group in enumerate(cached.groups(call, row)):
                here = group[:, places][:, :, places]
                assert float(here.sum()) == pytest.approx(here.shape[0] * len(places))
                scores = scores_of(here, WINDOW, combine)
                own = [x[row, head, places] for x in (call.key, bare, call.value)]
                turned = tuple(table[row, places] for table in tables) if tables is not None else None
                found = of_head(scores, *own, turned, **more)
                heads.append([(places[c], [places[j] for j in g], k, v) for c, g, k, v in found])
            rows.append(heads)
        out.append(rows)
    return out


def check(layers: Any, whole: Any, expected: Merged) -> int:
    """How many keys are means of several; all others are bit for bit those of the whole cache."""
    several = 0
    for layer, full, rows in zip(layers, whole, expected, strict=True):
        for row, heads in enumerate(rows):
            for head, found in enumerate(heads):
                start = layer.keys.shape[2] - len(found)
                for place, (old, group, key, value) in enumerate(found, start):
                    pairs = ((layer.keys, full.keys, key), (layer.values, full.values, value))
                    for got, before, mean in pairs:
                        alone = len(group) == 1
                        want = before[row, head, old] if alone else mean
                        assert difference(got[row, head, place], want) <= (0 if alone else 2e-5)
                    several += len(group) > 1
    return several


CASES = {
    "plain": {},
    "turned": {"space": "turned"},
    "sum": {"combine": "sum", "spare": 0.2},
    "values": {"merge_keys": False, "alike": 0.0},
    "one": {"budget": WINDOW + 1, "spare": 0.0},
}
SLOW = [
    ("qwen2", "turned"),
    ("qwen2", "sum"),
    ("qwen2", "values"),
    ("gpt2", "sum"),
    ("gpt2", "values"),
    ("gpt2", "one"),
]
CELLS = [
    pytest.param(name, case, marks=pytest.mark.slow if (name, case) in SLOW else ())
    for name in ("llama", "qwen2", "gpt2")
    for case in CASES
    if (name, case) != ("gpt2", "turned")
]


@pytest.mark.parametrize(("name", "case"), CELLS)
def test_caches_hold_the_means_of_the_run_by_hand(name: str, case: str) -> None:
    model = fleet.build(name)
    inputs = cached.continued(fleet.example(model, 3, PADS, text=25), torch.zeros(3, 0, dtype=torch.long))
    with torch.no_grad():
        full = model(**inputs)
    out = prune(model, **options(**CASES[case]))(**inputs)
    assert difference(out.logits, full.logits) == 0
    assert check(out.past_key_values.layers, full.past_key_values.layers, by_hand(model, inputs, **CASES[case])) > 3


def test_later_steps_go_on_from_the_merged_cache() -> None:
    """A cache filled by hand, which the unmodified model goes on from at the places after the whole prompt."""
    model = fleet.build("llama")
    inputs = cached.continued(fleet.example(model, 1, text=25), torch.zeros(1, 0, dtype=torch.long))
    tokens = inputs["input_ids"].shape[1]
    tokcompile.compile(model, target="eager", **options())
    out = model.generate(**inputs, **greedy(STEPS))
    tokcompile.restore(model)
    cache = DynamicCache()
    for layer, ((*heads,),) in enumerate(by_hand(model, inputs)):
        pair = [torch.stack([torch.stack([token[i] for token in head]) for head in heads])[None] for i in (2, 3)]
        cache.update(*pair, layer)
    for step in range(1, STEPS):
        with torch.no_grad():
            logits = model(
                input_ids=out.sequences[:, tokens + step - 1 : tokens + step],
                position_ids=torch.tensor([[tokens + step - 1]]),
                attention_mask=torch.ones(1, BUDGET + step, dtype=torch.long),
                past_key_values=cache,
            ).logits[:, -1]
        assert difference(out.logits[step], logits) <= 2e-5


@pytest.mark.parametrize("row", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_generate_of_a_padded_batch_is_each_row_alone(row: int) -> None:
    model = fleet.build("qwen2")
    inputs = fleet.example(model, 3, PADS, text=25)
    outs = []
    for each in (inputs, fleet.row(inputs, row, PADS[row])):
        torch._dynamo.reset()
        tokcompile.compile(model, target="eager", **options())
        outs.append(model.generate(**each, **greedy(STEPS)))
    tokcompile.restore(model)
    both, alone = (torch.stack(out.logits, 1) for out in outs)
    assert difference(alone[0], both[row]) <= 2e-5


def evicting(folder: Path) -> str:
    """The rule without its merge."""
    text = (Path(tokcompile.__file__).parent / "rules" / "ems.yaml").read_text()
    start, end = text.index("  - merge:"), text.index("  - evict:")
    text = (text[:start] + text[end:]).replace("      merged: classes\n", "").replace("rule: ems", "rule: mine")
    for name in ("alike", "spare", "space", "merge_keys"):
        begin = text.index(f"  {name}:\n")
        text = text[:begin] + text[text.index("    about:", begin) :].partition("\n")[2]
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_where_nothing_is_alike_it_is_the_eviction(tmp_path: Path) -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 3, PADS, text=25)
    one = prune(model, **options(alike=1.1))(**inputs)
    torch._dynamo.reset()
    other = prune(model, rule=evicting(tmp_path), budget=BUDGET, window=WINDOW)(**inputs)
    for left, right in zip(one.past_key_values.layers, other.past_key_values.layers, strict=True):
        assert torch.equal(left.keys, right.keys) and torch.equal(left.values, right.values)


def test_a_prompt_within_the_budget_stays_as_it_is() -> None:
    """In the graph of a prompt of any length."""
    model = fleet.build("llama")
    pruned = prune(model, dynamic=True, **options())
    for text in (25, 7, 11):
        inputs = cached.continued(fleet.example(model, 2, (0, 3), text=text), torch.zeros(2, 0, dtype=torch.long))
        layers = pruned(**inputs).past_key_values.layers
        with torch.no_grad():
            whole = model(**inputs).past_key_values.layers
        if text > BUDGET:
            assert check(layers, whole, by_hand(model, inputs)) > 3
            continue
        for got, want in zip(layers, whole, strict=True):
            assert torch.equal(got.keys, want.keys) and torch.equal(got.values, want.values)
    assert len(pruned.report.graphs) == 1


@pytest.mark.parametrize("name", ["phi", "glm4", pytest.param("cohere", marks=pytest.mark.slow)])
def test_keys_that_are_turned_in_part_or_pair_by_pair_lose_their_positions(name: str) -> None:
    """In the first block a text of equal tokens has equal keys: a mean of any of them is the one that stays."""
    model = families()[name].build()
    ids = torch.full((1, 20), 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        whole = model(**inputs).past_key_values.layers[0]
    for space, near in (("plain", True), ("turned", False)):
        torch._dynamo.reset()
        more = {"alike": 0.0, "spare": 0.0, "space": space}
        layer = prune(model, rule="ems", budget=6, window=2, **more)(**inputs).past_key_values.layers[0]
        distance = torch.cdist(layer.keys.double(), whole.keys.double()).amin(-1)
        assert (distance.max() <= 2e-6) == near
        assert torch.cdist(layer.values.double(), whole.values.double()).amin(-1).max() <= 2e-6


def test_a_rotation_that_is_not_known_is_refused() -> None:
    """Of a head of DeepSeek the last part is turned, once for all heads."""
    model = families()["deepseek_v3"].build()
    ids = torch.randint(3, 60, (1, 20), generator=torch.Generator().manual_seed(0))
    with pytest.raises(Exception, match="keys cannot be merged without their positions") as caught:
        prune(model, rule="ems", budget=6, window=2)(input_ids=ids)
    assert "space: turned" in refusal(caught.value).remedy


@pytest.mark.slow
def test_under_inductor_caches_are_the_same() -> None:
    model = fleet.build("llama")
    inputs = cached.continued(fleet.example(model, 3, PADS, text=25), torch.zeros(3, 0, dtype=torch.long))
    out = prune(model, target="inductor", **options())(**inputs).past_key_values.layers
    torch._dynamo.reset()
    for layer, want in zip(out, prune(model, **options())(**inputs).past_key_values.layers, strict=True):
        assert difference(layer.keys, want.keys) <= 2e-5 and difference(layer.values, want.values) <= 2e-5


GOOD = """
rule: mine
about: Merge keys.
steps:
  - score: {name: got, by: attention_received, at: "decoder.*.cache"}
  - score: {name: first, by: attention_received, at: decoder.0.cache}
  - score: {name: size, by: norm, at: "decoder.*.cache", largest: false}
  - select: {name: kept, by: topk, scores: got, among: all, keep: 9}
  - select: {name: small, by: topk, scores: size, among: all, keep: 9}
  - merge: {name: classes, by: likeness, at: "decoder.*.cache", keep: kept, scores: got}
  - evict: {at: "decoder.*.cache", keep: kept, merged: classes}
"""


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ("scores: got}\n  - evict", "scores: first}\n  - evict", "'first' scores decoder.0.cache, and 'merge' takes"),
        ("keep: kept, merged", "keep: small, merged", "'classes' merges around 'kept', and 'small' stays"),
        (
            'at: "decoder.*.cache", keep: kept, scores: got',
            "at: decoder.0.cache, keep: kept, scores: first",
            "those of decoder.0.cache are merged",
        ),
        ('likeness, at: "decoder.*.cache"', "likeness, at: decoder.0.input", "is not a place for by: likeness"),
        ("by: likeness", "by: kmeans", "'by: kmeans' does not use"),
        ("keep: kept, scores: got}", "keep: kept}", "'by: likeness' needs 'scores'"),
        ("scores: got}\n  - evict", "scores: got, alike: -1}\n  - evict", "'alike: -1' is negative"),
        ("by: norm, at", "by: joined, at", "'by: joined' needs 'scores'"),
        ("by: norm, at", "by: joined, scores: [first], at", "'first' scores decoder.0.cache, and 'score' takes"),
        ('by: norm, at: "decoder.*.cache"', "by: joined, scores: [got], at: decoder.0.input", "scores keys of caches"),
    ],
)
def test_what_does_not_fit_together_is_refused(old: str, new: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    load_rule(path)
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(RuleError, match=re.escape(cause)):
        load_rule(path)


def test_weights_below_zero_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace("scores: got}\n  - evict", "scores: size}\n  - evict"))
    model = fleet.build("llama")
    with pytest.raises(Exception, match="'size' may be below 0") as caught:
        prune(model, rule=str(path))(**fleet.example(model, 2, text=25))
    assert "attention received" in refusal(caught.value).remedy
