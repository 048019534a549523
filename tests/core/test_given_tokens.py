"""A rule's learned tokens given to a step after the prompt: each step says what the whole text says without a cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fleet
import layered
import longer
import naive
import pytest
import torch
from harness import cases, difference, greedy, prune, refusal
from torch import Tensor, nn
from transformers import DynamicCache

import tokcompile
from tokcompile import RuleError, Weights
from tokcompile.models import families

pytestmark = pytest.mark.usefixtures("one_thread")
PADS: dict[int, tuple[int, ...]] = {1: (), 3: (2, 0, 1)}
TEXT = 9
PLACES: dict[str, tuple[dict[str, Any], Any]] = {
    "every": ({"where": "every:4", "shared": True}, lambda valid: longer.every(valid, 4)),
    "front": ({"where": "front", "count": 3}, lambda valid: longer.front(valid, 3)),
    "none": ({"where": "front", "count": 0, "shared": True}, lambda valid: longer.front(valid, 0)),
}
POSITIONS = {
    "counted": {"positions": "compact", "fresh": "count"},
    "silent": {"positions": "compact", "fresh": "none"},
    "kept": {"positions": "keep", "fresh": "none"},
}
TALKS: dict[int, list[list[Any]]] = {
    1: [[None, 7, None, None, 8]],
    3: [[None, 7, None, 5, 8], [9, 6, None, None, 7], [5, 8, None, None, 6]],
}
"""What each row goes on with, one at a step: a word, or None for a token of the rule."""
HEADS = 4


def rule(folder: Path, insert: dict[str, Any], *, layer: bool = True, **fields: Any) -> str:
    """The path of a rule that inserts tokens `t`, which then attend to each other."""
    first = {"name": "t", "at": "decoder.0.input", "std": 1.0, "until": "head.input", **insert}
    second = {"by": "attention", "name": "own", "at": "decoder.*.middle", "of": "t", **fields}
    text = f"rule: layered\nabout: Put tokens in that attend to each other.\nsteps:\n  - insert: {json.dumps(first)}\n"
    path = folder / "layered.yaml"
    path.write_text(text + (f"  - layer: {json.dumps(second)}\n" if layer else ""))
    return str(path)


middle = partial(layered.middle, heads=HEADS)


class Talk:
    """A prompt of a compiled model and steps after it; the caller counts every token of these, whoever's it is."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, Tensor], name: str = "layered.t", *, masked: bool = True
    ) -> None:
        self.model, self.mask, self.name, self.masked = model, inputs["attention_mask"], name, masked
        inputs = inputs if masked else {"input_ids": inputs["input_ids"]}
        out = model(**inputs, position_ids=self._positions(self.mask.shape[1]))
        self.cache = out.past_key_values

    def _positions(self, count: int) -> Tensor:
        return (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]

    def say(self, columns: Sequence[Sequence[Any]], number: int = 0) -> Tensor:
        """Logits [B, N, V] of a step in which each row gets a list of N words, or None for the rule's token."""
        words = torch.tensor([[0 if each is None else each for each in row] for row in columns])
        self.mask = torch.cat([self.mask, torch.ones_like(words)], 1)
        given: dict[str, Tensor] = {"input_ids": words}
        flags = torch.tensor([[each is None for each in row] for row in columns])
        if flags.any():
            token = self.model.tokred.token(self.name, len(words))[:, number : number + 1]
            given = {"inputs_embeds": torch.where(flags[..., None], token, self.model.get_input_embeddings()(words))}
        told = {"attention_mask": self.mask} if self.masked else {}
        out = self.model(**given, **told, position_ids=self._positions(words.shape[1]), past_key_values=self.cache)
        self.cache = out.past_key_values
        return out.logits


@contextmanager
def compiled(model: nn.Module, *, target: str = "eager", **options: Any) -> Iterator[nn.Module]:
    tokcompile.compile(model, target=target, **options)
    try:
        with torch.no_grad():
            yield model
    finally:
        tokcompile.restore(model)


def trained(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Weights:
    """Weights of a rule, all of them other than at the start."""
    weights = Weights()
    prune(model, weights=weights, **options)(**inputs)
    layered.train(weights)
    torch._dynamo.reset()
    return weights


def by_hand(
    model: nn.Module,
    inputs: dict[str, Tensor],
    places: Callable[[list[list[bool]]], longer.Places],
    said: Sequence[Sequence[Any]],
    tokens: Tensor,
    number: int = 0,
    **how: Any,
) -> Tensor:
    """Logits [B, N, V] of the last N tokens, of one run of each row over all of it."""
    rows = []
    for row, words in enumerate(said):
        one = fleet.row(inputs, row)
        length = one["input_ids"].shape[1]
        own = [word for word in words if word is not None]
        where, done = places(longer.real(one))[0], length
        for word in words:
            where = [*where, (number, done - 1) if word is None else done]
            done += word is not None
        ids = torch.tensor([own], dtype=torch.long)
        one["input_ids"] = torch.cat([one["input_ids"], ids], 1)
        one["attention_mask"] = torch.cat([one["attention_mask"], torch.ones_like(ids)], 1)
        given = (one["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            logits, _ = longer.decoder(model, one, [where], tokens, given=given, remove=False, **how)
        rows.append(logits[0, -len(words) :])
    return torch.stack(rows)


def how(places: str, positions: str) -> dict[str, Any]:
    return {"counted": positions != "kept", "silent": positions != "counted", "hidden": places == "every"}


@pytest.mark.parametrize(
    "case",
    cases(
        2,
        name=("llama", "qwen2"),
        batch=(1, 3),
        blocks=(None, 0, 1),
        places=("every", "front", "none"),
        positions=tuple(POSITIONS),
        norm=("layer", "rms"),
    ),
)
def test_steps_equal_the_run_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    """Prefill of T and a step is prefill of T + 1, whose last is the rule's token in some rows, a word in others."""
    model = fleet.build(case["name"])
    inputs, talk = fleet.example(model, case["batch"], PADS[case["batch"]], text=TEXT), TALKS[case["batch"]]
    fields, places = PLACES[case["places"]]
    blocks = {} if case["blocks"] is None else {"blocks": case["blocks"]}
    insert = {**fields, **POSITIONS[case["positions"]]}
    path = rule(tmp_path, insert, norm=case["norm"], **blocks)
    some = rule(tmp_path / "..", {**insert, "where": "every:4", "count": 1}, norm=case["norm"], **blocks)
    weights = trained(model, inputs, rule=some if case["places"] == "none" else path)
    rule(tmp_path, insert, norm=case["norm"], **blocks)
    with compiled(model, rule=path, weights=weights):
        steps, got = Talk(model, inputs), []
        for count in range(len(talk[0])):
            got.append(steps.say([[row[count]] for row in talk]))
    tokens = weights.state_dict()["layered.t"]
    told = how(case["places"], case["positions"])
    expected = by_hand(model, inputs, places, talk, tokens, **told, middle=middle(weights))
    assert difference(torch.cat(got, 1), expected) <= 2e-5
    if case["blocks"] != 0:
        assert difference(expected, by_hand(model, inputs, places, talk, tokens, **told)) > 1e-3


@pytest.mark.parametrize("positions", ["counted", pytest.param("kept", marks=pytest.mark.slow)])
def test_a_step_of_many_tokens(positions: str, tmp_path: Path) -> None:
    """Words and tokens of the rule among each other, other ones in each row; here the second of three vectors."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, (2, 0), text=TEXT)
    fields, places = PLACES["front"]
    path = rule(tmp_path, {**fields, **POSITIONS[positions]})
    weights = trained(model, inputs, rule=path)
    talk = [[7, None, 8, None, None, 5], [None, 5, 6, 9, None, 4]]
    with compiled(model, rule=path, weights=weights):
        steps = Talk(model, inputs)
        got = [steps.say([row[:4] for row in talk], 1), steps.say([row[4:] for row in talk], 1)]
    told = {"tokens": weights.state_dict()["layered.t"], "number": 1, "middle": middle(weights)}
    expected = by_hand(model, inputs, places, talk, **told, **how("front", positions))
    assert difference(torch.cat(got, 1), expected) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["counted", "kept"])
def test_under_inductor(positions: str, tmp_path: Path) -> None:
    """One graph for any number of tokens: prompts of two lengths, and steps that are given more and more."""
    model = fleet.build("llama")
    path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS[positions]}, blocks=2)
    weights = trained(model, fleet.example(model, 2), rule=path)
    with compiled(model, rule=path, weights=weights, target="inductor", dynamic=True):
        talks = {}
        for text in (TEXT, 14):
            inputs = fleet.example(model, 2, (2, 0), text=text)
            steps = Talk(model, inputs)
            talks[text] = [steps.say(each) for each in ([[None], [9]], [[None], [None]], [[7], [8]], [[None], [5]])]
    told = {"tokens": weights.state_dict()["layered.t"], "middle": middle(weights), **how("every", positions)}
    for text, got in talks.items():
        inputs = fleet.example(model, 2, (2, 0), text=text)
        said = [[None, None, 7, None], [9, None, 8, 5]]
        expected = by_hand(model, inputs, PLACES["every"][1], said, **told)
        assert difference(torch.cat(got, 1), expected) <= 2e-5


@pytest.mark.parametrize("positions", ["counted", pytest.param("kept", marks=pytest.mark.slow)])
def test_generate_goes_on_behind_a_given_token(positions: str, tmp_path: Path) -> None:
    """It gets the ids that are new alone, and a mask of everything."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, (2, 0), text=TEXT)
    path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS[positions]})
    weights = trained(model, inputs, rule=path)
    with compiled(model, rule=path, weights=weights):
        steps = Talk(model, inputs)
        first = steps.say([[None], [9]])
        word = first[:, -1].argmax(-1, keepdim=True)
        mask = torch.cat([steps.mask, torch.ones_like(word)], 1)
        out = model.generate(input_ids=word, attention_mask=mask, past_key_values=steps.cache, **greedy(3))
    new = out.sequences
    said = [[None, *new[0].tolist()], [9, *new[1].tolist()]]
    told = {"tokens": weights.state_dict()["layered.t"], "middle": middle(weights), **how("every", positions)}
    expected = by_hand(model, inputs, PLACES["every"][1], said, **told)[:, 1:-1]
    assert difference(torch.stack(out.logits, 1), expected) <= 1e-4


def test_the_rule_of_the_library(tmp_path: Path) -> None:
    """A llava's decoder, at random places; none in so short a text is no other graph for its steps."""
    del tmp_path
    model = fleet.build("llava")
    inputs = fleet.example(model, 2)
    options: dict[str, Any] = {"share": 0.25, "seed": 2, "layers": 2}
    weights = trained(model, inputs, rule="meta_tokens", **options)
    talk = [[None, 7, None], [9, None, None]]
    total = inputs["input_ids"].shape[1]
    count = round(total / 4)
    lucky = sorted(naive.best(torch.tensor(naive.lucky(total + count, 2)), range(total + count), count))
    with compiled(model, rule="meta_tokens", weights=weights, **options):
        steps = Talk(model, inputs, "meta_tokens.meta")
        got = [steps.say([[row[i]] for row in talk]) for i in range(3)]
    told = {
        "tokens": weights.state_dict()["meta_tokens.meta"],
        "middle": middle(weights, name="meta_tokens", layer="attention"),
    }
    expected = by_hand(model, inputs, lambda valid: longer.at(valid, lucky), talk, **told)
    assert difference(torch.cat(got, 1), expected) <= 2e-5


@pytest.mark.slow
def test_another_base_of_rotations(tmp_path: Path) -> None:
    """A rule that only replaces frequencies goes with it: as a model that has these itself."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=TEXT)
    path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS["silent"]})
    rules = [{"rule": "rope_scaling", "base": 500, "scaling": "none"}, {"rule": path}]
    weights = trained(model, inputs, rules=rules)
    with compiled(model, rules=rules, weights=weights):
        steps = Talk(model, inputs)
        got = [steps.say([[word]]) for word in TALKS[1][0]]
    other = families.decoder(
        "llama", fleet.TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    ).eval()
    other.load_state_dict(model.state_dict())
    told = {"tokens": weights.state_dict()["layered.t"], "middle": middle(weights), **how("every", "silent")}
    expected = by_hand(other, inputs, PLACES["every"][1], TALKS[1], **told)
    assert difference(torch.cat(got, 1), expected) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_behind_a_drop_that_took_some_of_the_prompt_s(positions: str, tmp_path: Path) -> None:
    """What is handed on are the tokens that were left in each block. With a mask such steps are refused."""
    model = fleet.build("llama")
    inputs = fleet.example(model, 2, text=TEXT)
    path = rule(tmp_path, {"where": "every:3", "shared": True, **POSITIONS["counted"], "until": None})
    dropping = tmp_path / "dropping.yaml"
    dropping.write_text(
        "rule: dropping\nabout: Drop any tokens.\nsteps:\n"
        "  - score: {name: luck, by: random, at: decoder.1.input, seed: 2}\n"
        "  - select: {name: kept, by: topk, scores: luck, among: all, keep: 9}\n"
        f"  - drop: {{at: decoder.1.input, keep: kept, positions: {positions}}}\n"
    )
    rules = [{"rule": path}, {"rule": str(dropping)}]
    weights = trained(model, inputs, rules=rules)
    pruned = prune(model, rules=rules, weights=weights)
    pruned(input_ids=inputs["input_ids"])
    (kept,) = pruned.kept
    torch._dynamo.reset()
    talk, got = [[None, 7, None], [9, None, 8]], []
    with compiled(model, rules=rules, weights=weights):
        steps = Talk(model, inputs, masked=False)
        got = [steps.say([[row[i]] for row in talk]) for i in range(3)]
    total = len(longer.every(longer.real(inputs), 3)[0])
    assert any(place < total and longer.every([[True] * 10], 3)[0][place] not in range(10) for place in range(total))
    told = {"tokens": weights.state_dict()["layered.t"], "middle": middle(weights)}
    for row in range(2):
        own = [*kept[row], *range(total, total + 3)]
        cuts = {1: naive.Cut(1, lambda state, own=own: [own], positions == "compact")}
        one, said = fleet.row(inputs, row), [talk[row]]
        expected = by_hand(model, one, lambda valid: longer.every(valid, 3), said, **told, cuts=cuts)
        assert difference(torch.cat(got, 1)[row : row + 1], expected) <= 2e-5


@pytest.mark.slow
def test_a_model_that_scales_embeddings_does_not_scale_the_token(tmp_path: Path) -> None:
    """The same as one whose embeddings are that large, and which scales nothing."""
    sizes = fleet.TEXT | {"tie_word_embeddings": False}
    model = families.decoder("granite", sizes | {"embedding_multiplier": 3.0}).eval()
    plain = families.decoder("granite", sizes).eval()
    plain.load_state_dict(model.state_dict())
    plain.get_input_embeddings().weight.data *= 3.0
    got = []
    for each in (model, plain):
        inputs = fleet.example(each, 2, text=TEXT)
        path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS["counted"]})
        weights = trained(each, inputs, rule=path)
        with compiled(each, rule=path, weights=weights):
            steps = Talk(each, inputs)
            got.append(torch.cat([steps.say([[None], [None]]), steps.say([[7], [8]])], 1))
    assert difference(*got) <= 2e-5


# What ordinary steps pay, and what is refused.


def test_a_step_of_words_has_nothing_of_it(tmp_path: Path) -> None:
    """Its graph takes nothing, and is that of a rule without such a layer."""
    model, counts = fleet.shared("llama"), []
    inputs = fleet.example(model, 1, text=TEXT)
    for layer in (True, False):
        torch._dynamo.reset()
        path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS["counted"]}, layer=layer)
        carried = tokcompile.decoding.carried.Carried()
        pruned = prune(model, rule=path, carried=carried)
        cache = pruned(**inputs).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        carried.values.clear()
        more = {"attention_mask": mask, "position_ids": torch.tensor([[TEXT + 1]]), "past_key_values": cache}
        pruned(input_ids=torch.tensor([[7]]), **more)
        counts.append(pruned.report.graphs[1][0])
    assert counts[0].phase == "decode" and counts[0].counts == counts[1].counts and counts[0].steps == counts[1].steps


def _given(model: nn.Module, weights: Weights, call: Any, name: str = "layered.t") -> None:
    """Give a step after a prompt the rule's token."""
    inputs = fleet.example(model, 1, text=TEXT)
    with torch.no_grad():
        cache = call(**inputs, position_ids=torch.arange(TEXT + 1)[None]).past_key_values
        mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        more = {"attention_mask": mask, "position_ids": torch.tensor([[TEXT + 1]]), "past_key_values": cache}
        call(inputs_embeds=weights.token(name)[:, :1], **more)


@pytest.mark.parametrize(
    ("name", "insert", "layer", "plain", "why"),
    [
        ("llama", {}, True, True, "nobody keeps what it needs"),
        pytest.param("llama", POSITIONS["kept"], False, True, "nobody keeps what it needs", marks=pytest.mark.slow),
        ("llama", {"at": "decoder.1.input"}, True, False, "have none in their caches"),
        ("gpt2", POSITIONS["kept"], False, False, "come from a table"),
    ],
)
def test_a_step_that_cannot_be_given_a_token_says_why(
    name: str, insert: dict[str, Any], layer: bool, plain: bool, why: str, tmp_path: Path
) -> None:
    """When it runs: such a step may have embeddings of words, which are as ever."""
    model, weights = fleet.build(name), Weights()
    fields = {"where": "every:4", "shared": True, **POSITIONS["counted"], **insert}
    path = rule(tmp_path, fields, layer=layer)
    if plain:
        options = {"rule": path, "weights": weights, "target": "eager"}
        call: Any = torch.compile(model, backend="tokred", options=options)
    else:
        call = tokcompile.compile(model, rule=path, weights=weights, target="eager")
    with pytest.raises(RuntimeError, match=why):
        _given(model, weights, call)


@pytest.mark.slow
def test_a_step_without_need_of_the_prompt_takes_a_token_under_torch_compile(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS["counted"]}, layer=False)
    weights = Weights()
    _given(model, weights, prune(model, rule=path, weights=weights))


def test_a_cache_of_another_prompt_is_refused(tmp_path: Path) -> None:
    model = fleet.build("llama")
    inputs = fleet.example(model, 1, text=TEXT)
    with torch.no_grad():
        cache = model(**inputs, past_key_values=DynamicCache()).past_key_values
    path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS["counted"]})
    weights = trained(model, inputs, rule=path)
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
    more = {"attention_mask": mask, "position_ids": torch.tensor([[TEXT + 1]]), "past_key_values": cache}
    with compiled(model, rule=path, weights=weights), pytest.raises(Exception, match="no prompt of this") as caught:
        model(inputs_embeds=weights.token("layered.t"), **more)
    assert refusal(caught.value).remedy


def test_only_learned_tokens_have_vectors() -> None:
    weights = Weights()
    weights.load_state_dict({"a.t": torch.ones(2, 3), "a.bias": torch.ones(3)})
    assert torch.equal(weights.token("a.t", 4), torch.ones(4, 2, 3)) and not weights.token("a.t").requires_grad
    for name in ("a.bias", "a.u", "b.t", "t"):
        with pytest.raises(RuleError, match="names no learned tokens") as caught:
            weights.token(name)
        assert "a.t" in caught.value.found
