"""route: which cached keys each later step attends to, against runs by hand."""

from __future__ import annotations

from typing import Any

import cached
import fleet
import pytest
import routed
import torch
from harness import difference, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile.models import families

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
PADS = (0, 3, 20)
"""The last row has fewer real tokens than are attended to, at first."""
ENDS = {"first": 2, "middle": 4, "last": 3}


def build(name: str) -> nn.Module:
    """A model of the fleet, a decoder with two blocks alone: it takes less long to compile."""
    if name not in ("llama", "qwen2", "gpt2"):
        return fleet.build(name)
    more = {"n_layer": 2, "n_head": 4, "n_embd": 64} if name == "gpt2" else {"num_hidden_layers": 2}
    return families.decoder(name, fleet.TEXT | more).eval()


def example(model: nn.Module, rows: int = 3, pads: tuple[int, ...] = PADS, text: int = 25) -> dict[str, Tensor]:
    """Inputs in which no token comes twice: keys of equal tokens are equal in the first layer, but for positions."""
    inputs = fleet.example(model, rows, pads, text=text)
    rng = torch.Generator().manual_seed(7)
    for row, valid in enumerate(inputs["attention_mask"].bool()):
        inputs["input_ids"][row, valid] = torch.randperm(57, generator=rng)[: int(valid.sum())] + 5
    return inputs


def layout_of(name: str, model: nn.Module) -> routed.Layout | None:
    if name in ("gpt2", "opt"):
        return None
    inverse = model.get_decoder().rotary_emb.inv_freq.double().tolist()
    return routed.Layout(inverse)


def generated(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Logits [B, STEPS, V] and the tokens but the last one [B, STEPS - 1]."""
    torch._dynamo.reset()
    tokcompile.compile(model, target="eager", **options)
    out = model.generate(**inputs, **greedy(STEPS), suppress_tokens=[fleet.IMAGE])
    tokcompile.restore(model)
    return torch.stack(out.logits, 1), out.sequences[:, -STEPS:-1]


def by_hand(model: nn.Module, inputs: dict[str, Tensor], more: Tensor, choose: Any, whole: bool = False) -> Tensor:
    """Logits of the last prompt token and of the tokens after it, one a step, or all in one."""
    tokens, count = inputs["input_ids"].shape[1], more.shape[1]
    both = cached.continued(inputs, more)
    steps = [(tokens, tokens + count)] if whole else [(tokens + i, tokens + i + 1) for i in range(count)]
    with routed.routed(model, steps, both["attention_mask"].bool().tolist(), choose), torch.no_grad():
        return model(**both, use_cache=False).logits[:, tokens - 1 :]


def options(positions: str = "rank", **more: Any) -> dict[str, Any]:
    return {"rule": "tokenselect", "positions": positions, **ENDS, **more}


def votes(name: str, model: nn.Module, positions: str = "rank", **more: Any) -> routed.Votes:
    return routed.Votes(layout_of(name, model) if positions == "rank" else None, **ENDS, **more)


slow = pytest.mark.slow
CASES = [
    ("llama", "rank", {}),
    pytest.param("qwen2", "rank", {"kernel": 3}, marks=slow),
    pytest.param("llama", "keep", {"kernel": 3}, marks=slow),
    pytest.param("gpt2", "keep", {}, marks=slow),
    pytest.param("opt", "keep", {}, marks=slow),
]


@pytest.mark.parametrize(("name", "positions", "more"), CASES)
def test_generate_equals_a_run_that_picks_keys_in_every_step(name: str, positions: str, more: dict[str, Any]) -> None:
    model = build(name)
    inputs = example(model)
    logits, tokens = generated(model, inputs, **options(positions, **more))
    naive = votes(name, model, positions, **more)
    assert difference(logits, by_hand(model, inputs, tokens, naive)) <= 2e-5
    # Rows with few tokens attend to all of them; others to the first, the last and some between.
    assert {row for _, row, *_ in naive.chosen} == {0, 1}
    for _, _, picks, _ in naive.chosen:
        assert picks == sorted(set(picks)) and len(picks) == 9
        assert picks[:2] == [0, 1] and picks[-1] - picks[-3] == 2


LAYOUTS = {
    "cohere": (True, 1),
    "glm": (True, 2),
    "gpt_neox": (False, 4),
}
"""Whether pairs are side by side, and which part of a head is turned."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=slow) for n in LAYOUTS])
def test_other_layouts_of_rotations(name: str) -> None:
    """Pairs side by side, and rotations of a part of each head."""
    neighbours, part = LAYOUTS[name]
    model = families.decoder(name, fleet.TEXT | {"head_dim": 16, "num_hidden_layers": 2}).eval()
    inputs = example(model)
    logits, tokens = generated(model, inputs, **options())
    inverse = model.get_decoder().rotary_emb.inv_freq.double().tolist()
    assert len(inverse) == 8 // part
    naive = routed.Votes(routed.Layout(inverse, neighbours=neighbours), **ENDS)
    assert difference(logits, by_hand(model, inputs, tokens, naive)) <= 2e-5
    assert naive.chosen


def question(model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor, **given: Any) -> Tensor:
    """Logits of a question of several tokens in one step after a prompt."""
    torch._dynamo.reset()
    counted, both = cached.continued(inputs, tokens[:, :0]), cached.continued(inputs, tokens)
    tokcompile.compile(model, target="eager", **given)
    with torch.no_grad():
        cache = model(**counted).past_key_values
        out = model(
            input_ids=tokens,
            attention_mask=both["attention_mask"],
            position_ids=both["position_ids"][:, -tokens.shape[1] :],
            past_key_values=cache,
        ).logits
    tokcompile.restore(model)
    return out


@pytest.mark.parametrize("last", [3, pytest.param(6, marks=slow)])
def test_a_question_of_several_tokens_is_causal_within(last: int) -> None:
    """Longer than the last tokens that are always kept, or shorter: its own tokens are all up for attention."""
    model = build("llama")
    inputs = example(model)
    tokens = torch.tensor([[3, 4, 62, 8, 9]]).repeat(3, 1)
    got = question(model, inputs, tokens, **options(last=last))
    naive = routed.Votes(layout_of("llama", model), 2, 4, last)
    assert difference(got, by_hand(model, inputs, tokens, naive, whole=True)[:, 1:]) <= 2e-5
    assert len(naive.chosen) == 4


@slow
def test_short_texts_are_attended_to_whole() -> None:
    """N <= first + middle + last: full causal attention, to the bit where the length is known, near where it is not."""
    model = build("llama")
    inputs = example(model)
    plain = model.generate(**inputs, **greedy(STEPS), suppress_tokens=[fleet.IMAGE])
    logits, tokens = generated(model, inputs, **options(middle=99))
    assert torch.equal(tokens, plain.sequences[:, -STEPS:-1])
    expected = torch.stack(plain.logits, 1)
    assert difference(logits[:, 0], expected[:, 0]) == 0
    assert difference(logits, expected) <= 1e-5


def test_prompts_are_the_models_own() -> None:
    model = build("llama")
    inputs = example(model)
    with torch.no_grad():
        full = model(**inputs)
    pruned = prune(model, **options())
    out = pruned(**inputs)
    assert difference(out.logits, full.logits) == 0
    for one, other in zip(out.past_key_values.layers, full.past_key_values.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert "later steps choose keys" in pruned.report.graphs[0][0].steps[0]["note"]


@slow
@pytest.mark.parametrize("target", ["eager", "inductor"])
def test_plain_compile_generates_the_same(target: str) -> None:
    model = build("llama")
    inputs = example(model, 2, (0, 3))
    expected, tokens = generated(model, inputs, **options())
    torch._dynamo.reset()
    model.compile(backend="tokred", options={**options(), "target": target})
    got = model.generate(**inputs, **greedy(STEPS), suppress_tokens=[fleet.IMAGE])
    assert torch.equal(got.sequences[:, -STEPS:-1], tokens)
    assert difference(torch.stack(got.logits, 1), expected) <= 2e-5
    lengths = {layer.keys.shape[2] for layer in got.past_key_values.layers}
    assert lengths == {26 + STEPS - 1}


def test_one_graph_serves_steps_of_all_lengths() -> None:
    """Shorter and longer than what is attended to."""
    model = build("llama")
    pruned = prune(model, dynamic=True, **options())
    for text in (3, 12, 25):
        inputs = cached.continued(example(model, 2, (0, 2), text=text), torch.zeros(2, 0, dtype=torch.long))
        both = cached.continued(inputs, torch.tensor([[62, 3, 4], [4, 3, 62]]))
        with torch.no_grad():
            cache = model(**inputs).past_key_values
        got = pruned(
            input_ids=both["input_ids"][:, -3:],
            attention_mask=both["attention_mask"],
            position_ids=both["position_ids"][:, -3:],
            past_key_values=cache,
        ).logits
        naive = votes("llama", model)
        expected = by_hand(model, inputs, both["input_ids"][:, -3:], naive, whole=True)[:, 1:]
        assert difference(got, expected) <= 2e-5
        assert bool(naive.chosen) == (text > 6)
    assert len(pruned.report.graphs) == 1


@pytest.mark.parametrize("reuse", [0.2, pytest.param(-1, marks=slow), pytest.param(1.5, marks=slow)])
def test_a_choice_serves_again_while_the_queries_are_alike(reuse: float) -> None:
    """A threshold of -1 always reuses, one above 1 never: then it is the rule without."""
    model = build("llama")
    inputs = example(model)
    logits, tokens = generated(model, inputs, **options(reuse=reuse))
    naive = votes("llama", model, reuse=reuse)
    assert difference(logits, by_hand(model, inputs, tokens, naive)) <= 2e-5
    again = [used for *_, used in naive.chosen]
    count = len(again)
    assert {-1: sum(again) == count - 4, 1.5: not any(again)}.get(reuse, 0 < sum(again) < count - 4)


def test_reuse_needs_someone_who_keeps_the_choice() -> None:
    model = build("llama")
    model.compile(backend="tokred", options={**options(reuse=0.9), "target": "eager"})
    with pytest.raises(Exception, match="which keys the last step chose") as caught:
        model.generate(**example(model), **greedy(2))
    assert "tokcompile.compile" in refusal(caught.value).remedy


REFUSED = [
    ("gpt2", options(), "nothing turns its queries and keys"),
    ("mistral", options(), "every block attends in a window"),
]


@pytest.mark.parametrize(("name", "given", "why"), REFUSED)
def test_a_prompt_is_refused_where_later_steps_could_not_choose(name: str, given: dict[str, Any], why: str) -> None:
    model = build(name)
    with pytest.raises(Exception, match="ttention") as caught:
        prune(model, **given)(**example(model))
    error = refusal(caught.value)
    assert why in f"{error.cause} {error.found}"
    assert error.remedy


@pytest.mark.parametrize(
    ("other", "why"),
    [({"rule": "snapkv", "window": 2}, "evicted and chosen from"), ({"rule": "random", "among": "all"}, "their ranks")],
)
@pytest.mark.parametrize("first", [True, pytest.param(False, marks=slow)])
def test_rules_that_move_keys_are_refused(other: dict[str, Any], why: str, first: bool) -> None:
    model = build("llama")
    rules = [other, options()] if first else [options(), other]
    with pytest.raises(Exception, match=why):
        prune(model, rules=rules)(**example(model))


def test_output_of_weights_is_refused() -> None:
    model = fleet.build("llama", attention="eager")
    inputs = example(model, 1, ())
    pruned = prune(model, **options())
    cache = pruned(**inputs).past_key_values
    with pytest.raises(Exception, match="output_attentions"):
        pruned(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, output_attentions=True)


def test_positions_that_do_not_follow_are_an_error_when_the_graph_runs() -> None:
    model = build("llama")
    inputs = example(model, 1, ())
    tokcompile.compile(model, target="eager", **options())
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        with pytest.raises(RuntimeError, match="do not follow"):
            model(input_ids=inputs["input_ids"][:, :1], position_ids=torch.tensor([[77]]), past_key_values=cache)
    tokcompile.restore(model)


@slow
@pytest.mark.parametrize("first", [{"rule": "hiprune", "keep": 6}, {"rule": "fastv", "layer": 1, "keep": 5}])
def test_after_a_drop_each_row_of_a_batch_is_as_alone(first: dict[str, Any]) -> None:
    """Votes under `positions: keep` need no positions."""
    model = build("llava")
    inputs = fleet.example(model, 2, (0, 5), text=9)
    rules = [first, options("keep")]
    both, tokens = generated(model, inputs, rules=rules)
    for row, pad in enumerate((0, 5)):
        alone, own = generated(model, fleet.row(inputs, row, pad), rules=rules)
        assert torch.equal(own[0], tokens[row])
        assert difference(alone[0], both[row]) <= 2e-5


@slow
def test_blocks_with_windows_stay_beside_those_that_choose() -> None:
    """Gemma 2 attends in a window of 12 in every other block, and caps its scores."""
    model = fleet.build("gemma2", attention="eager")
    inputs = example(model, 2, ())
    logits, tokens = generated(model, inputs, **options(middle=99))
    plain = model.generate(**inputs, **greedy(STEPS), suppress_tokens=[fleet.IMAGE])
    assert difference(logits, torch.stack(plain.logits, 1)) <= 1e-5
    fewer, _ = generated(model, inputs, **options())
    assert difference(fewer, logits) > 1e-3
