"""Tokens put into a text: compiled, the model says what the same model says by hand on the longer sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import longer
import naive
import pytest
import torch
import torch.nn.functional as F
from harness import cases, difference, greedy, prune, refusal
from inserting import drawn, held, rule, tokens
from torch import nn

import tokcompile
from tokcompile import Weights

pytestmark = pytest.mark.usefixtures("one_thread")
PADS: dict[int, tuple[int, ...]] = {1: (), 3: (2, 0, 1)}
TEXT = 12
PLACES: dict[str, tuple[dict[str, Any], Any]] = {
    "front": ({"where": "front", "count": 3}, lambda valid: longer.front(valid, 3)),
    "end": ({"where": "end", "count": 2}, lambda valid: longer.end(valid, 2)),
    "every": ({"where": "every:4", "count": 2}, lambda valid: longer.every(valid, 4, 2)),
    "listed": ({"where": "listed", "places": [0, 3, 3]}, lambda valid: longer.at(valid, [0, 4, 5])),
    "random": (
        {"where": "random", "count": 4, "seed": 3},
        lambda valid: longer.at(valid, _lucky(len(valid[0]) + 4, 4, 3)),
    ),
}
POSITIONS = {
    "counted": {"positions": "compact", "fresh": "count"},
    "silent": {"positions": "compact", "fresh": "none"},
    "kept": {"positions": "keep", "fresh": "none"},
}
HIDDEN = ("every", "listed", "random")
"""Where inserted tokens may stand among padding, and are then hidden as it is."""


def _lucky(places: int, count: int, seed: int) -> list[int]:
    """Places that a seed chooses."""
    return sorted(naive.best(torch.tensor(naive.lucky(places, seed)), range(places), count))


def _how(places: str, positions: str) -> dict[str, Any]:
    return {"counted": positions != "kept", "silent": positions != "counted", "hidden": places in HIDDEN}


@pytest.mark.parametrize(
    "case",
    cases(
        5,
        name=("llama", "qwen2", "llava"),
        attention=("sdpa", "eager"),
        batch=(1, 3),
        block=(0, 2),
        places=tuple(PLACES),
        positions=tuple(POSITIONS),
    ),
)
def test_a_text_equals_the_run_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    """To the last bit, padding and its logits among it."""
    model = fleet.shared(case["name"], attention=case["attention"])
    inputs = fleet.example(model, case["batch"], PADS[case["batch"]], text=TEXT)
    fields, places = PLACES[case["places"]]
    at, weights = f"decoder.{case['block']}.input", Weights()
    path = rule(tmp_path, at=at, until="head.input", **fields, **POSITIONS[case["positions"]])
    out = prune(model, rule=path, weights=weights)(**inputs)
    with torch.no_grad():
        logits, lengths = longer.decoder(
            model,
            inputs,
            places(longer.real(inputs)),
            tokens(weights),
            case["block"],
            **_how(case["places"], case["positions"]),
        )
    assert difference(out.logits, logits) == 0
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == lengths


def test_logits_of_inserted_tokens_are_there_unless_taken_out(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, 3, PADS[3])
    weights = Weights()
    out = prune(model, rule=rule(tmp_path, where="front", count=2), weights=weights)(**inputs)
    with torch.no_grad():
        logits, _ = longer.decoder(
            model,
            inputs,
            longer.front(longer.real(inputs), 2),
            tokens(weights),
            counted=False,
            silent=True,
            hidden=False,
            remove=False,
        )
    assert difference(out.logits, logits) == 0


@pytest.mark.parametrize("content", ["zero", "mean"])
def test_tokens_that_are_not_learned(content: str, tmp_path: Path) -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, 3, PADS[3])
    weights = Weights()
    path = rule(tmp_path, where="front", count=2, content=content, until="head.input")
    out = prune(model, rule=path, weights=weights)(**inputs)
    assert not weights.state_dict()
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
    for row, valid in enumerate(longer.real(inputs)):
        real = embedded[row, valid].mean(0, keepdim=True)
        made = real if content == "mean" else torch.zeros_like(real)
        one = fleet.row(inputs, row)
        with torch.no_grad():
            logits, _ = longer.decoder(
                model, one, longer.front([valid], 2), made, counted=False, silent=True, hidden=False
            )
        assert difference(out.logits[row : row + 1, valid], logits[:, valid]) <= 1e-5


def test_no_tokens_keep_every_bit(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, 3, PADS[3])
    with torch.no_grad():
        expected = model(**inputs).logits
    weights = Weights()
    out = prune(model, rule=rule(tmp_path, where="front", count=0, until="head.input"), weights=weights)(**inputs)
    assert difference(out.logits, expected) == 0 and not weights.state_dict()


def test_a_padded_row_is_what_it_is_alone(tmp_path: Path) -> None:
    """Tokens in front of the text stand behind what pads it."""
    model = fleet.shared("llama")
    batch = fleet.example(model, 3, PADS[3])
    weights = held("putting", "t", drawn(3, 64))
    path = rule(tmp_path, where="front", count=3, until="head.input", **POSITIONS["counted"])
    together = prune(model, rule=path, weights=weights)(**batch).logits
    alone = prune(model, dynamic=True, rule=path, weights=weights)
    for number, pad in enumerate(PADS[3]):
        one = alone(**fleet.row(batch, number, pad)).logits
        assert difference(together[number : number + 1, pad:], one) <= 1e-5


@pytest.mark.parametrize(
    ("fields", "places"),
    [
        ({"where": "front", "count": 3}, lambda valid: longer.front(valid, 3)),
        ({"where": "every:4", "shared": True}, lambda valid: longer.every(valid, 4)),
        (
            {"where": "random", "share": 0.25, "shared": True},
            lambda valid: longer.at(
                valid, _lucky(len(valid[0]) + round(len(valid[0]) / 4), round(len(valid[0]) / 4), 0)
            ),
        ),
    ],
    ids=["front", "every", "random"],
)
def test_one_dynamic_graph_serves_all_lengths(fields: dict[str, Any], places: Any, tmp_path: Path) -> None:
    """Among the lengths is one that makes the sequence as long as the stream is wide."""
    model = fleet.shared("llama")
    weights = Weights()
    path = rule(tmp_path, until="head.input", **fields, **POSITIONS["counted"])
    pruned = prune(model, dynamic=True, rule=path, weights=weights)
    for batch, pads, text in ((2, (1, 0), 7), (3, (0, 3, 1), 18), (2, (), 63)):
        inputs = fleet.example(model, batch, pads, text=text, seed=text)
        out = pruned(**inputs)
        with torch.no_grad():
            logits, _ = longer.decoder(
                model,
                inputs,
                places(longer.real(inputs)),
                tokens(weights),
                **_how(fields["where"].partition(":")[0], "counted"),
            )
        valid = inputs["attention_mask"].bool()
        assert difference(out.logits[valid], logits[valid]) <= 1e-5
    assert len(pruned.report.graphs) == 1


def test_a_token_without_a_position_has_one_key_wherever_it_stands(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, text=TEXT)
    positions = torch.arange(TEXT + 1)[None]
    held_keys = {}
    for label in ("silent", "counted"):
        torch._dynamo.reset()
        pruned = prune(model, rule=rule(tmp_path, where="listed", places=[4, 9], **POSITIONS[label]))
        for shift in (0, 7):
            keys = pruned(**inputs, position_ids=positions + shift).past_key_values.layers[0].keys
            held_keys[label, shift] = keys[:, :, [4, 10]]
    assert torch.equal(held_keys["silent", 0], held_keys["silent", 7])
    assert not torch.allclose(held_keys["counted", 0], held_keys["counted", 7])


def test_a_loss_is_that_of_the_tokens_that_are_the_text_s_own(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, 2)
    weights = Weights()
    path = rule(tmp_path, where="every:3", shared=True, until="head.input", **POSITIONS["counted"])
    out = prune(model, rule=path, weights=weights)(**inputs, labels=inputs["input_ids"])
    with torch.no_grad():
        logits, _ = longer.decoder(model, inputs, longer.every(longer.real(inputs), 3), tokens(weights))
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten())
    assert difference(out.logits, logits) == 0
    assert abs(out.loss.item() - expected.item()) <= 1e-6


def test_tokens_before_features_are_spliced_stand_at_no_place_of_a_feature(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS[3])
    weights = held("putting", "t", drawn(4, 64))
    logits = []
    for at in ("embedding.output", "decoder.0.input"):
        torch._dynamo.reset()
        path = rule(tmp_path, at=at, where="listed", places=[1, 4, 9, 20], until="head.input", **POSITIONS["counted"])
        logits.append(prune(model, rule=path, weights=weights)(**inputs).logits)
    assert difference(*logits) == 0


def test_a_later_drop_never_takes_inserted_tokens(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS[3])
    path = rule(tmp_path, where="listed", places=[1, 4, 9])
    pruned = prune(model, rules=[{"rule": path}, {"rule": "random", "keep": 5}])
    pruned(**inputs)
    places = longer.at(longer.real(inputs), [1, 5, 11])
    for ids, row, kept in zip(inputs["input_ids"], places, pruned.kept[-1], strict=True):
        assert len(kept) == len(row) - 16 + 5
        assert all(
            not isinstance(row[i], tuple) and ids[row[i]] == fleet.IMAGE for i in set(range(len(row))) - set(kept)
        )


# Steps after the prompt.


@pytest.mark.parametrize(
    "case",
    cases(
        5,
        name=("llama", "qwen2"),
        plain=(False, True),
        batch=(1, 3),
        block=(0, 2),
        places=("front", "end", "every", "listed"),
        positions=("counted", "kept"),
    ),
)
def test_generate_equals_a_run_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    """Also prefill of T and one step is prefill of T + 1: the run by hand has no cache."""
    if case["plain"] and case["block"]:
        pytest.skip("one mask fits no two lengths of caches: torch.compile alone cannot")
    model = fleet.build(case["name"])
    inputs = fleet.example(model, case["batch"], PADS[case["batch"]], text=TEXT)
    fields, places = PLACES[case["places"]]
    at, weights = f"decoder.{case['block']}.input", Weights()
    path = rule(tmp_path, at=at, until="head.input", **fields, **POSITIONS[case["positions"]])
    if case["plain"]:
        model.compile(backend="tokred", options={"rule": path, "target": "eager", "weights": weights})
    else:
        tokcompile.compile(model, rule=path, target="eager", weights=weights)
    got = torch.stack(model.generate(**inputs, **greedy(3)).logits, 1)
    brought = tokens(weights)
    tokcompile.restore(model)
    how = _how(case["places"], case["positions"])
    assert difference(got, longer.steps(model, inputs, places, 3, tokens=brought, block=case["block"], **how)) <= 1e-4


def test_random_places_go_on_without_padding_alone(tmp_path: Path) -> None:
    fields, places = PLACES["random"]
    path = rule(tmp_path, until="head.input", **fields, **POSITIONS["counted"])
    model, weights = fleet.build("llama"), Weights()
    inputs = fleet.example(model, 2, text=TEXT)
    tokcompile.compile(model, rule=path, target="eager", weights=weights)
    got = torch.stack(model.generate(**inputs, **greedy(3)).logits, 1)
    with pytest.raises(RuntimeError, match="padded prompt"):
        model.generate(**fleet.example(model, 2, (2, 0), text=TEXT), **greedy(3))
    tokcompile.restore(model)
    how = _how("random", "counted")
    assert difference(got, longer.steps(model, inputs, places, 3, tokens=tokens(weights), **how)) <= 1e-4


# Learned positions.


@pytest.mark.parametrize("positions", ["counted", "kept"])
def test_learned_positions_of_a_longer_text(positions: str, tmp_path: Path) -> None:
    """Behind the embedding they are those of the longer sequence, or nothing is added to inserted tokens."""
    model = fleet.shared("gpt2")
    inputs = fleet.example(model, 2)
    weights = held("putting", "t", drawn(2, 64))
    path = rule(
        tmp_path, at="embedding.output", where="listed", places=[0, 5], until="head.input", **POSITIONS[positions]
    )
    out = prune(model, rule=path, weights=weights)(**inputs, use_cache=False)
    places = longer.at(longer.real(inputs), [0, 6])
    stack, words = model.transformer, model.transformer.wte(inputs["input_ids"])
    length = words.shape[1]
    if positions == "counted":
        x = longer.put(words, places, tokens(weights)) + stack.wpe(torch.arange(length + 2))
    else:
        x = longer.put(words + stack.wpe(torch.arange(length)), places, tokens(weights))
    with torch.no_grad():
        for block in stack.h:
            made = block(x, attention_mask=torch.ones(length + 2, length + 2, dtype=torch.bool).tril()[None, None])
            x = made[0] if isinstance(made, tuple) else made
        logits = model.lm_head(longer.take_out(stack.ln_f(x), places))
    assert difference(out.logits, logits) <= 1e-5


def test_learned_positions_that_were_numbered_anew_do_not_go_on(tmp_path: Path) -> None:
    model = fleet.build("gpt2")
    path = rule(tmp_path, at="embedding.output", where="front", count=2, until="head.input", **POSITIONS["counted"])
    tokcompile.compile(model, rule=path, target="eager")
    with pytest.raises(Exception, match="come from a table") as caught:
        model.generate(**fleet.example(model, 2), **greedy(3))
    assert "fresh: none" in refusal(caught.value).remedy


# What is refused.


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"where": "front", "count": 2, "fresh": "count"}, "two tokens would have one position"),
        ({"where": "front"}, "needs one of count"),
        ({"where": "front", "count": 2, "share": 0.5}, "does not use 'share'"),
        ({"where": "listed", "count": 2}, "does not use 'count'"),
        ({"where": "every:0"}, "not one of its values"),
        ({"where": "front", "count": -1}, "cannot be inserted"),
        ({"where": "random", "share": 1.5}, "is no share"),
        ({"where": "listed", "places": [3, 1]}, "no list of places"),
        ({"where": "front", "count": 2, "flatten": True}, "belong to readout"),
        ({"where": "front", "count": 2, "readout": "tokens", "until": "head.input"}, "cannot be read out"),
        ({"where": "front", "count": 2, "at": "decoder.*.input"}, "every block"),
        ({"where": "front", "count": 2, "at": "decoder.0.attention"}, "not a place for an insertion"),
        ({"where": "front", "count": 2, "until": "decoder.0.attention"}, "not a place where tokens can be taken out"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(fields: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(tokcompile.RuleError, match=why) as caught:
        tokcompile.compile(nn.Linear(2, 2), rule=rule(tmp_path, **fields))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "fields", "why"),
    [
        ("gpt2", {"where": "front", "count": 2, **POSITIONS["counted"]}, "no rotary positions"),
        ("llama", {"where": "patches", "count": 2}, "no patches"),
        ("llama", {"where": "listed", "places": [40]}, "does not have"),
        (
            "llama",
            {"at": "decoder.1.input", "where": "front", "count": 2, "until": "decoder.0.input"},
            "before they are",
        ),
        ("llama", {"where": "front", "count": 0, "readout": "tokens"}, "none can be read out"),
    ],
)
def test_an_insertion_that_cannot_be_done_is_refused(
    name: str, fields: dict[str, Any], why: str, tmp_path: Path
) -> None:
    model = fleet.shared(name)
    with pytest.raises(Exception, match=why) as caught:
        prune(model, rule=rule(tmp_path, **fields))(**fleet.example(model))
    assert refusal(caught.value).where


def test_one_vector_for_each_of_a_symbolic_number_of_places_is_refused(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    with pytest.raises(Exception, match="how many vectors are learned") as caught:
        prune(model, dynamic=True, rule=rule(tmp_path, where="every:3"))(**fleet.example(model, 2))
    assert "shared" in refusal(caught.value).remedy


def test_a_window_s_cache_is_refused(tmp_path: Path) -> None:
    model = fleet.shared("gemma2", attention="eager")
    with pytest.raises(Exception, match="keys or queries by place") as caught:
        prune(model, rule=rule(tmp_path, where="front", count=2))(**fleet.example(model, text=20))
    assert "use_cache=False" in refusal(caught.value).remedy
