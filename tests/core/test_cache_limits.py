"""What users meet who shorten a cache: limits that other libraries have, and which these tests say are none here.

Which keys are chosen is asked in test_evict and test_family_evict; conversations that go on in test_evict_turns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import metadata
from typing import Any

import cached
import fleet
import pytest
import torch
from harness import Pruned, difference, greedy, prune, refusal
from packaging.requirements import Requirement
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, StaticCache
from transformers.modeling_outputs import ModelOutput

import tokcompile
from tokcompile.backend import Report, tokred
from tokcompile.models import catalogue, families

pytestmark = pytest.mark.usefixtures("one_thread")
BUDGET, STEPS = 9, 3
PADS = (0, 3, 22)
"""The last row has 4 real tokens: fewer than the budget."""
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"budget": BUDGET, "window": 4, "kernel": 3},
    "adakv": {"budget": BUDGET, "window": 4, "kernel": 3},
    "pyramidkv": {"budget": BUDGET, "window": 2, "beta": 4},
    "h2o": {"budget": BUDGET, "recent": 3},
    "knorm": {"budget": BUDGET},
    "keydiff": {"budget": BUDGET},
    "random_kv": {"budget": BUDGET},
}
NAMES = [pytest.param(name, marks=() if name in ("snapkv", "adakv", "knorm") else pytest.mark.slow) for name in OPTIONS]


def example(model: nn.Module) -> dict[str, Tensor]:
    return fleet.example(model, 3, PADS, text=25)


@dataclass
class Shortened:
    """A padded prompt under a rule, compiled as one graph, beside the whole caches."""

    inputs: dict[str, Tensor]
    layers: list[Any]
    whole: list[Any]
    logits: Tensor
    expected: Tensor
    report: Report = field(default_factory=Report)


@cache
def shortened(rule: str) -> Shortened:
    model = fleet.build("llama")
    inputs, report = example(model), Report()
    torch._dynamo.reset()
    options = {"rule": rule, **OPTIONS[rule], "target": "eager", "report": report}
    compiled = torch.compile(model, backend=tokred, fullgraph=True, options=options)
    with torch.no_grad():
        out, full = compiled(**inputs), model(**inputs)
    layers, whole = out.past_key_values.layers, full.past_key_values.layers
    return Shortened(inputs, layers, whole, out.logits, full.logits, report)


@pytest.mark.parametrize("rule", NAMES)
def test_a_prompt_is_one_graph_without_breaks(rule: str) -> None:
    """With `fullgraph=True` a break is an error."""
    of = shortened(rule)
    assert len(of.report.graphs) == 1
    assert difference(of.logits, of.expected) == 0


def test_steps_are_one_graph_without_breaks() -> None:
    model = fleet.build("llama")
    report = Report()
    options = {"rule": "snapkv", **OPTIONS["snapkv"], "target": "eager", "report": report}
    model.compile(backend="tokred", fullgraph=True, options=options)
    model.generate(**example(model), **greedy(STEPS))
    # The second step's graph is for any length: the others run it.
    assert [graph[0].phase for graph in report.graphs] == ["prefill", "decode"] + ["decode"] * (len(report.graphs) - 2)
    assert len(report.graphs) <= 3


def test_a_prompt_and_steps_need_of_a_model_what_its_versions_share() -> None:
    """No name that a release renames, as `cache_position` was: a call says its tokens, and its positions, alone."""
    wanted = next(
        Requirement(r) for r in metadata.requires("tokcompile") or () if Requirement(r).name == "transformers"
    )
    assert all(version in wanted.specifier for version in ("5.17.0", "5.20.0", "5.23.0"))
    assert metadata.version("transformers") in wanted.specifier
    model = fleet.build("llama")
    ids = example(model)["input_ids"][:1]
    pruned = prune(model, rule="snapkv", **OPTIONS["snapkv"])
    cache = pruned(input_ids=ids).past_key_values
    assert [layer.keys.shape[2] for layer in cache.layers] == [BUDGET] * len(cache.layers)
    out = pruned(input_ids=ids[:, -1:], position_ids=torch.tensor([[ids.shape[1]]]), past_key_values=cache)
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [BUDGET + 1] * len(cache.layers)


@pytest.mark.parametrize("rule", NAMES)
def test_padding_is_never_kept_before_tokens(rule: str) -> None:
    """A row keeps padding only where it has fewer tokens than the budget, and then all of its tokens."""
    of = shortened(rule)
    for layer, whole in zip(of.layers, of.whole, strict=True):
        count = layer.keys.shape[2]
        if rule == "adakv":
            _check_all_heads(layer.keys, whole.keys)
            continue
        for row, pad in enumerate(PADS):
            real = whole.keys.shape[2] - pad
            for head in range(whole.keys.shape[1]):
                same = (layer.keys[row, head][:, None] == whole.keys[row, head][None]).all(-1)
                kept = same.nonzero()[:, 1].tolist()
                assert len({*kept} & {*range(pad, pad + real)}) == min(real, count)


def _check_all_heads(kept: Tensor, whole: Tensor) -> None:
    """Heads that share a budget keep together as many tokens as if each had its own, and no padding before these."""
    heads, count = kept.shape[1:3]
    for row, pad in enumerate(PADS):
        same = (kept[row].flatten(0, 1)[:, None] == whole[row, :, pad:].flatten(0, 1)[None]).all(-1)
        assert len({*same.nonzero()[:, 1].tolist()}) == heads * min(whole.shape[2] - pad, count)


@pytest.mark.parametrize("rule", NAMES)
def test_what_is_evicted_is_freed(rule: str) -> None:
    """A cache owns as many bytes as it has numbers, and its layers have the budget in all."""
    of = shortened(rule)
    counts = [layer.keys.shape[2] for layer in of.layers]
    assert sum(counts) == BUDGET * len(counts)
    for layer, whole in zip(of.layers, of.whole, strict=True):
        for held, full in ((layer.keys, whole.keys), (layer.values, whole.values)):
            assert held.untyped_storage().nbytes() == held.numel() * held.element_size()
            assert held.numel() < full.numel()


class Largest(TorchDispatchMode):
    """Notes the shapes of all values that operators give."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(v.shape) for v in torch.utils._pytree.tree_leaves(out) if isinstance(v, Tensor)}
        return out


@pytest.mark.parametrize("rule", [pytest.param("snapkv"), pytest.param("h2o")])
def test_no_square_of_the_prompt_is_made_for_all_heads(rule: str) -> None:
    """Attention stays fused, and its weights are summed head by head: nothing is as large as [B, H, T, T]."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, (0, 3), text=99)
    program = tokcompile.rewrite(tokcompile.export(model, inputs), rule=rule, **OPTIONS[rule])
    with Largest() as seen, torch.no_grad():
        program.module()(**inputs)
    heads, tokens = model.config.num_attention_heads, inputs["input_ids"].shape[1]
    square = 2 * heads * tokens * tokens
    assert {shape for shape in seen.shapes if math.prod(shape) >= square} == set()
    model.set_attn_implementation("eager")
    with Largest() as seen, torch.no_grad():
        model(**inputs)
    assert {shape for shape in seen.shapes if math.prod(shape) >= square}  # which the watch would have seen


@pytest.mark.parametrize(
    ("tokens", "ratio", "kept"),
    [
        (100, "1/10", 10),
        (100, 0.1, 10),
        (100, "20%", 20),
        (10, 0.05, 1),
        (pytest.param(1000, 0.2, 200, marks=pytest.mark.slow)),
    ],
)
def test_budgets_of_ratios_are_exact_and_at_least_one(tokens: int, ratio: Any, kept: int) -> None:
    """In floats int(1000 * (1 - 0.8)) is 199 and int(100 * (1 - 0.9)) is 9; and 0.05 of ten tokens is none."""
    model = families.decoder("llama", fleet.TEXT | {"num_hidden_layers": 1, "max_position_embeddings": 1024}).eval()
    inputs = fleet.example(model, text=tokens - 1)
    (layer,) = prune(model, rule="knorm", budget=ratio)(**inputs).past_key_values.layers
    assert layer.keys.shape[2] == kept


def test_rows_choose_for_themselves() -> None:
    """A row of a batch keeps what it keeps alone, and another's text changes nothing."""
    of = shortened("snapkv")
    model = fleet.build("llama")
    for row in (0, 1):
        alone = prune(model, rule="snapkv", **OPTIONS["snapkv"])(**fleet.row(of.inputs, row, PADS[row]))
        for layer, other in zip(of.layers, alone.past_key_values.layers, strict=True):
            # Padding moves the row, and so its keys; values do not turn.
            assert difference(layer.values[row], other.values[0]) <= 2e-5
    assert difference(of.layers[0].values[0], of.layers[0].values[1]) > 0.1


def test_a_question_of_several_tokens_under_caches_of_many_lengths_and_windows() -> None:
    """Blocks 0 and 2 attend in a window of 12, the others keep 14 and 4 keys of 26; several queries at once."""
    model = catalogue.family("cohere2").build()
    inputs = fleet.example(model, 2, (0, 3), text=25)
    counted = cached.continued(inputs, inputs["input_ids"][:, :0])
    tokens = counted["input_ids"].shape[1]
    with cached.observed(model) as calls, torch.no_grad():
        model(**counted)
    real = inputs["attention_mask"].bool().tolist()
    budgets = cached.pyramid(BUDGET, 2, 4, 2, tokens)
    votes = partial(cached.votes, window=2, kernel=5)
    stay = cached.masks(cached.choices([calls[1], calls[3]], real, lambda _: votes, budgets, recent=2), tokens)
    every = torch.ones_like(stay[0])
    question = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    both = cached.continued(inputs, question)
    with cached.observed(model, [every, stay[0], every, stay[1]], tokens), torch.no_grad():
        expected = model(**both, use_cache=False).logits[:, tokens:]
    tokcompile.compile(model, target="eager", rule="pyramidkv", **OPTIONS["pyramidkv"])
    with torch.no_grad():
        held = model(**counted).past_key_values
        assert [layer.keys.shape[2] for layer in held.layers] == [11, budgets[0], 11, budgets[1]]
        got = model(
            input_ids=question,
            attention_mask=both["attention_mask"],
            position_ids=both["position_ids"][:, tokens:],
            past_key_values=held,
        ).logits
    assert difference(got, expected) <= 2e-5


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
def test_heads_that_share_a_budget_free_memory_and_take_a_question_of_40_tokens(attention: str) -> None:
    """Of 512 tokens half stay: exactly so many bytes, at heads of 64 numbers, and no key is faked."""
    model = families.decoder("llama", fleet.TEXT | {"head_dim": 64, "max_position_embeddings": 1024}).eval()
    model.set_attn_implementation(attention)
    inputs = fleet.example(model, 1, text=511)
    counted = cached.continued(inputs, inputs["input_ids"][:, :0])
    with cached.observed(model) as calls, torch.no_grad():
        model(**counted)
    votes = partial(cached.votes, window=32, kernel=7, pool="max")
    real = inputs["attention_mask"].bool().tolist()
    chosen = cached.choices(calls, real, lambda _: votes, [256] * 3, cached.Joint(), recent=32)
    assert any(len(heads[0]) != len(heads[1]) for rows in chosen for heads in rows)
    both = cached.continued(inputs, torch.randint(5, 60, (1, 40), generator=torch.Generator().manual_seed(1)))
    with cached.observed(model, cached.masks(chosen, 512), 512), torch.no_grad():
        expected = model(**both, use_cache=False).logits[:, 512:]
    tokcompile.compile(model, target="eager", rule="adakv", budget=0.5)
    with torch.no_grad():
        held = model(**counted).past_key_values
        tensors = [tensor for layer in held.layers for tensor in (layer.keys, layer.values)]
        token = 2 * 3 * 2 * 64 * 4  # keys and values, layers, heads, numbers, bytes
        assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 256 * token
        assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == 256 * token
        own = {name: both[name][:, 512:] for name in ("input_ids", "position_ids")}
        got = model(**own, attention_mask=both["attention_mask"], past_key_values=held).logits
    tokcompile.restore(model)
    assert {layer.keys.shape[2] for layer in held.layers} == {256 + 40}
    assert difference(got, expected) <= 2e-5


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["llama", "opt", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_call_that_would_count_positions_from_the_short_cache_is_refused(name: str, masked: bool) -> None:
    """transformers' model starts at the length of the cache when nobody says otherwise; with positions it goes on."""
    model = fleet.build(name)
    inputs = fleet.example(model, 1, text=25)
    tokens = inputs["input_ids"].shape[1]
    step = {"input_ids": inputs["input_ids"][:, :1]}
    if masked:
        step["attention_mask"] = torch.ones(1, tokens + 1, dtype=torch.long)
    tokcompile.compile(model, target="eager", rule="knorm", budget=BUDGET)
    with torch.no_grad():
        held = model(**inputs).past_key_values
        with pytest.raises(Exception, match="counts its position from the cache") as caught:
            model(**step, past_key_values=held)
        assert "position_ids" in refusal(caught.value).remedy
        model(**step, past_key_values=held, position_ids=torch.tensor([[tokens]]))
    assert held.layers[0].keys.shape[2] == BUDGET + 1


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bart", "counts its position from the cache"),
        pytest.param("whisper", "counts its position from the cache", marks=pytest.mark.slow),
        ("t5", "adds a bias to its scores"),
    ],
)
def test_decoders_that_are_not_told_positions_are_refused(name: str, why: str) -> None:
    """Encoder-decoders: tables whose rows the cache's length picks, and biases by distance."""
    family = catalogue.family(name)
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    tokcompile.compile(model, target="eager", rule="knorm", budget=5)
    with pytest.raises(Exception, match=why) as caught, torch.no_grad():
        held = model(**inputs).past_key_values
        model(**{**inputs, "decoder_input_ids": inputs["decoder_input_ids"][:, :1]}, past_key_values=held)
    error = refusal(caught.value)
    assert error.where and error.remedy


@pytest.mark.parametrize("rule", [name for name in NAMES if name.values != ("adakv",)])
def test_steps_go_on_in_the_buffers_of_a_static_cache(rule: str) -> None:
    """What stays of a prompt is in the caller's buffers, which stay what they are, and the next tokens go behind it."""
    of, model = shortened(rule), fleet.build("llama")
    counts = [layer.keys.shape[2] for layer in of.layers]
    held = StaticCache(config=model.config, max_cache_len=max(counts) + STEPS)
    options = OPTIONS[rule] | ({"when": "prefill"} if rule == "h2o" else {})
    torch._dynamo.reset()
    tokcompile.compile(model, target="eager", rule=rule, **options)
    with torch.no_grad():
        out = model(**of.inputs, past_key_values=held)
        assert out.past_key_values is held and difference(out.logits, of.logits) <= 2e-5
        places = [layer.keys.data_ptr() for layer in held.layers]
        for layer, short in zip(held.layers, of.layers, strict=True):
            assert layer.keys.shape[2] == max(counts) + STEPS
            assert difference(layer.keys[:, :, : short.keys.shape[2]], short.keys) <= 2e-5
        tokens = of.inputs["input_ids"].shape[1]
        grown = cached.continued(of.inputs, torch.full((3, STEPS), 7))
        for step in range(tokens, tokens + STEPS):
            model(
                input_ids=grown["input_ids"][:, step : step + 1],
                attention_mask=grown["attention_mask"][:, : step + 1],
                position_ids=grown["position_ids"][:, step : step + 1],
                past_key_values=held,
            )
    assert [layer.keys.data_ptr() for layer in held.layers] == places
    assert [int(layer.cumulative_length) for layer in held.layers] == [count + STEPS for count in counts]


@pytest.mark.parametrize(
    ("early", "why"),
    [(False, "from a cache that is not known"), (True, "does not say how many tokens it holds")],
)
def test_a_static_cache_under_plain_compile_is_refused_and_a_dynamic_one_is_taken(early: bool, why: str) -> None:
    """A backend does not see caches from call to call; buffers may be there before the prompt, or be made in it."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=25)
    pruned = prune(model, rule="knorm", budget=BUDGET)
    held = StaticCache(config=model.config, max_cache_len=32)
    if early:
        held.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    with pytest.raises(Exception, match=why) as caught:
        pruned(**inputs, past_key_values=held)
    remedy = refusal(caught.value).remedy
    assert "tokcompile.compile" in remedy and "transformers' DynamicCache" in remedy
    torch._dynamo.reset()
    out = pruned(**inputs, past_key_values=DynamicCache(config=model.config))
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [BUDGET] * 3


def test_nothing_stays_on_the_model_after_restore() -> None:
    """No hook, no attribute, no parameter; transformers' own attentions are untouched."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, (0, 3), text=25)
    with torch.no_grad():
        before = model(**inputs)
        model(**inputs, output_hidden_states=True)  # transformers' own hooks, which stay, and older PyTorch traces with
    attributes, attentions = _attributes(model), dict(AttentionInterface().items())
    tokcompile.compile(model, target="eager", rule="snapkv", **OPTIONS["snapkv"])
    model.generate(**inputs, **greedy(STEPS))
    assert _attributes(model) != attributes  # or this test would say nothing
    tokcompile.restore(model)
    assert _attributes(model) == attributes
    assert {name: AttentionInterface()[name] for name in attentions} == attentions
    with torch.no_grad():
        after = model(**inputs)
    assert torch.equal(after.logits, before.logits)
    for one, other in zip(after.past_key_values.layers, before.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys)


def _attributes(model: nn.Module) -> dict[str, Any]:
    """By module what it holds, hooks and compiled calls among it, and the attention that it is set to."""
    held = {name: {key: _told(value) for key, value in vars(m).items()} for name, m in model.named_modules()}
    return held | {"attention": model.config._attn_implementation}


def _told(value: Any) -> Any:
    """What can be compared of an attribute: the names in a mapping, whether there is something, a number itself."""
    if isinstance(value, Mapping):
        return sorted(map(str, value))
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def test_a_second_prompt_is_shortened_by_its_own_keys() -> None:
    """Re-entry: nothing of the first prompt is left in the compiled model."""
    model = fleet.build("llama")
    pruned: Pruned = prune(model, rule="snapkv", **OPTIONS["snapkv"])
    first, second = (fleet.example(model, 2, (0, 3), text=25, seed=seed) for seed in (0, 1))
    pruned(**first)
    again = pruned(**second)
    torch._dynamo.reset()
    fresh: ModelOutput = prune(model, rule="snapkv", **OPTIONS["snapkv"])(**second)
    for one, other in zip(again.past_key_values.layers, fresh.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
