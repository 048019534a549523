"""Inserted tokens that attend to each other once more, in the decoders of the fleet, against the run by hand."""

from __future__ import annotations

import json
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

import tokcompile
from tokcompile import Weights

pytestmark = pytest.mark.usefixtures("one_thread")
PADS: dict[int, tuple[int, ...]] = {1: (), 3: (2, 0, 1)}
TEXT = 12
PLACES: dict[str, tuple[dict[str, Any], Any]] = {
    "front": ({"where": "front", "count": 3}, lambda valid: longer.front(valid, 3)),
    "every": ({"where": "every:4", "shared": True}, lambda valid: longer.every(valid, 4)),
    "listed": ({"where": "listed", "places": [0, 3, 3, 9]}, lambda valid: longer.at(valid, [0, 4, 5, 12])),
}
POSITIONS = {
    "counted": {"positions": "compact", "fresh": "count"},
    "silent": {"positions": "compact", "fresh": "none"},
    "kept": {"positions": "keep", "fresh": "none"},
}
HIDDEN = ("every", "listed")
HEADS = 4


def rule(folder: Path, insert: dict[str, Any], **layer: Any) -> str:
    """The path of a rule that inserts tokens `t`, which then attend to each other."""
    first = {"name": "t", "at": "decoder.0.input", "std": 1.0, "until": "head.input", **insert}
    second = {"by": "attention", "name": "own", "at": "decoder.*.middle", "of": "t", **layer}
    path = folder / "layered.yaml"
    first = {key: value for key, value in first.items() if value is not None}
    path.write_text(
        "rule: layered\nabout: Put tokens in that attend to each other.\nsteps:\n"
        f"  - insert: {json.dumps(first)}\n  - layer: {json.dumps(second)}\n"
    )
    return str(path)


middle = partial(layered.middle, heads=HEADS)


def trained(model: nn.Module, inputs: dict[str, Tensor], path: str, **options: Any) -> Weights:
    """Weights of a rule, all of them other than at the start."""
    weights = Weights()
    prune(model, rule=path, weights=weights, **options)(**inputs)
    layered.train(weights)
    torch._dynamo.reset()
    return weights


def how(places: str, positions: str) -> dict[str, Any]:
    return {"counted": positions != "kept", "silent": positions != "counted", "hidden": places in HIDDEN}


def tokens(weights: Weights, name: str = "layered.t") -> Tensor:
    return weights.state_dict()[name]


@pytest.mark.parametrize(
    "case",
    cases(
        4,
        name=("llama", "qwen2", "llava"),
        attention=("sdpa", "eager"),
        batch=(1, 3),
        block=(0, 1),
        blocks=(None, 1),
        places=tuple(PLACES),
        positions=tuple(POSITIONS),
        norm=("layer", "rms"),
    ),
)
def test_a_text_equals_the_run_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    """Trained weights; the blocks that have the layer are the first that hold the tokens."""
    model = fleet.shared(case["name"], attention=case["attention"])
    inputs = fleet.example(model, case["batch"], PADS[case["batch"]], text=TEXT)
    fields, places = PLACES[case["places"]]
    insert = {"at": f"decoder.{case['block']}.input", **fields, **POSITIONS[case["positions"]]}
    blocks = {} if case["blocks"] is None else {"blocks": case["blocks"]}
    path = rule(tmp_path, insert, norm=case["norm"], **blocks)
    weights = trained(model, inputs, path)
    out = prune(model, rule=path, weights=weights)(**inputs)
    given = (model, inputs, places(longer.real(inputs)), tokens(weights), case["block"])
    with torch.no_grad():
        expected, lengths = longer.decoder(*given, **how(case["places"], case["positions"]), middle=middle(weights))
        without, _ = longer.decoder(*given, **how(case["places"], case["positions"]))
    assert difference(out.logits, expected) <= 2e-5
    assert difference(out.logits, without) > 1e-3
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == lengths
    numbers = {name.split("_")[1] for name in weights.state_dict() if name.startswith("layered.own_")}
    assert numbers == {str(n) for n in range(case["block"], 3 if case["blocks"] is None else case["block"] + 1)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_an_untrained_layer_changes_no_bit(name: str, tmp_path: Path) -> None:
    """Its output starts as zeros."""
    model = fleet.shared(name, attention="eager" if name == "gemma2" else "sdpa")
    inputs = fleet.example(model, 2, (1, 0)) | ({"use_cache": False} if name == "gemma2" else {})
    weights, logits = Weights(), []
    for blocks in (3, 0):
        torch._dynamo.reset()
        path = rule(tmp_path, {"where": "every:3"}, blocks=blocks)
        logits.append(prune(model, rule=path, weights=weights)(**inputs).logits)
    assert difference(*logits) == 0
    assert len(weights.state_dict()) == 1 + 3 * 6


def test_absolute_positions_turn_nothing(tmp_path: Path) -> None:
    """GPT-2 adds positions to embeddings: its layer reads them there."""
    model = fleet.shared("gpt2")
    inputs = fleet.example(model, 2)
    path = rule(tmp_path, {"where": "listed", "places": [2, 5]}, blocks=1)
    weights = trained(model, inputs, path)
    got = prune(model, rule=path, weights=weights)(**inputs, use_cache=False).logits
    # The block by hand, up to the end of its attention; then the layer, and the model's own modules again.
    block, places = model.transformer.h[0], longer.at(longer.real(inputs), [2, 6])
    ids = inputs["input_ids"]
    with torch.no_grad():
        x = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
        x = longer.put(x, places, tokens(weights))
        more = x.shape[1]
        mask = torch.ones(more, more, dtype=torch.bool).tril()[None, None]
        x = x + block.attn(block.ln_1(x), attention_mask=mask)[0]
        flags = longer.inserted(places, longer.real(inputs))
        x = layered.attend(x, flags, layered.parts(weights, "layered", "own", 0), HEADS)
        x = x + block.mlp(block.ln_2(x))
        for later in model.transformer.h[1:]:
            x = x + later.attn(later.ln_1(x), attention_mask=mask)[0]
            x = x + later.mlp(later.ln_2(x))
        expected = model.lm_head(longer.take_out(model.transformer.ln_f(x), places))
    assert difference(got, expected) <= 2e-5


def test_no_tokens_have_no_layer(tmp_path: Path) -> None:
    """No tokens leave every bit as it was."""
    model = fleet.shared("llama")
    inputs = fleet.example(model, 3, PADS[3])
    with torch.no_grad():
        expected = model(**inputs).logits
    for path, options in ((rule(tmp_path, {"where": "front", "count": 0}), {}), ("meta_tokens", {"share": 0})):
        torch._dynamo.reset()
        weights = Weights()
        pruned = prune(model, rule=path, weights=weights, **options)
        assert difference(pruned(**inputs).logits, expected) == 0 and not weights.state_dict()
        assert "no edit" in pruned.report.graphs[0][0].steps[-1]["note"]


@pytest.mark.parametrize("places", ["random", "every"])
def test_the_rule_of_the_library_equals_the_run_by_hand(places: str) -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, 3, PADS[3], text=TEXT)
    options: dict[str, Any] = {"places": places, "share": 0.25, "seed": 2, "layers": 2}
    weights = trained(model, inputs, "meta_tokens", **options)
    got = prune(model, rule="meta_tokens", weights=weights, **options)(**inputs).logits
    valid = longer.real(inputs)
    total, count = len(valid[0]), round(len(valid[0]) / 4)
    luck = torch.tensor(naive.lucky(total + count, 2))
    lucky = longer.at(valid, sorted(naive.best(luck, range(total + count), count)))
    rows = longer.every(valid, 4) if places == "every" else lucky
    with torch.no_grad():
        expected, _ = longer.decoder(
            model,
            inputs,
            rows,
            tokens(weights, "meta_tokens.meta"),
            middle=middle(weights, name="meta_tokens", layer="attention"),
        )
    assert difference(got, expected) <= 2e-5
    assert sum("query" in name for name in weights.state_dict()) == 2


def test_a_padded_row_is_what_it_is_alone(tmp_path: Path) -> None:
    model = fleet.shared("llama")
    batch = fleet.example(model, 3, PADS[3])
    path = rule(tmp_path, {"where": "front", "count": 3, **POSITIONS["counted"]})
    weights = trained(model, batch, path)
    together = prune(model, rule=path, weights=weights)(**batch).logits
    alone = prune(model, dynamic=True, rule=path, weights=weights)
    for number, pad in enumerate(PADS[3]):
        one = alone(**fleet.row(batch, number, pad)).logits
        assert difference(together[number : number + 1, pad:], one) <= 1e-5


def test_tokens_among_padding_are_hidden_from_the_others(tmp_path: Path) -> None:
    """A row that ends alike says the same, however much pads it and however many tokens stand among that."""
    model = fleet.shared("llama")
    logits = []
    path = rule(tmp_path, {"where": "every:4", "shared": True, **POSITIONS["kept"]})
    weights = trained(model, fleet.example(model, 1, text=8), path)
    pruned = prune(model, dynamic=True, rule=path, weights=weights)
    rng = torch.Generator().manual_seed(5)
    words = torch.randint(5, 60, (1, 9), generator=rng)
    for pad in (0, 4, 8):
        ids = torch.cat([torch.zeros(1, pad, dtype=torch.long), words], 1)
        mask = (torch.arange(pad + 9) >= pad)[None].long()
        places = (torch.arange(pad + 9) - pad).clamp(min=0)[None]
        logits.append(pruned(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, pad:])
    assert difference(logits[0], logits[1]) <= 1e-5 and difference(logits[0], logits[2]) <= 1e-5


@pytest.mark.parametrize(
    ("lengths", "graphs"), [((20, 27), 1), pytest.param((20, 6, 3), 3, marks=pytest.mark.slow)], ids=["some", "few"]
)
def test_a_dynamic_graph_serves_many_lengths(lengths: tuple[int, ...], graphs: int, tmp_path: Path) -> None:
    """How many tokens there are is a symbol too; one token, and none, have graphs of their own as everywhere."""
    model = fleet.shared("llama")
    path = rule(tmp_path, {"where": "random", "share": 0.1, "shared": True, **POSITIONS["counted"]})
    weights = Weights()
    pruned = prune(model, dynamic=True, rule=path, weights=weights)
    for length in lengths:
        inputs = fleet.example(model, 2, (), text=length - 1, seed=length)
        if not weights.state_dict():
            pruned(**inputs)
            layered.train(weights)
        got = pruned(**inputs).logits
        count = round(length * 0.1)
        luck = torch.tensor(naive.lucky(length + count, 0))
        rows = longer.at(longer.real(inputs), sorted(naive.best(luck, range(length + count), count)))
        with torch.no_grad():
            expected, _ = longer.decoder(model, inputs, rows, tokens(weights), middle=middle(weights))
        assert difference(got, expected) <= 2e-5
    assert len(pruned.report.graphs) == graphs


# Steps after the prompt, and other rules.


@pytest.mark.parametrize(
    "case", cases(4, name=("llama", "qwen2"), batch=(1, 3), places=("front", "every"), positions=("counted", "kept"))
)
def test_generate_equals_a_run_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    """Prefill of T and one step is prefill of T + 1, for an ordinary token."""
    model = fleet.build(case["name"])
    inputs = fleet.example(model, case["batch"], PADS[case["batch"]], text=TEXT)
    fields, places = PLACES[case["places"]]
    path = rule(tmp_path, {**fields, **POSITIONS[case["positions"]]})
    weights = trained(model, inputs, path)
    tokcompile.compile(model, rule=path, target="eager", weights=weights)
    got = torch.stack(model.generate(**inputs, **greedy(3)).logits, 1)
    tokcompile.restore(model)
    told = {"tokens": tokens(weights), "middle": middle(weights), **how(case["places"], case["positions"])}
    expected = longer.steps(model, inputs, places, 3, **told)
    assert difference(got, expected) <= 1e-4


@pytest.mark.parametrize("positions", ["keep", "compact"])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_later_drop_may_take_some_of_the_tokens(positions: str, seed: int, tmp_path: Path) -> None:
    """Flags are read again in each block, and so are the rows of rotary tables, which a drop may number anew."""
    model = fleet.shared("llama")
    inputs = fleet.example(model, 2, text=TEXT)
    path = rule(tmp_path, {"where": "every:3", **POSITIONS["counted"], "until": None})
    drop = {"rule": _dropping(tmp_path, positions), "seed": seed}
    weights = trained(model, inputs, path)
    pruned = prune(model, rules=[{"rule": path}, drop], weights=weights)
    got = pruned(**inputs, use_cache=False).logits
    (kept,) = pruned.kept
    places = longer.every(longer.real(inputs), 3)
    flags = longer.inserted(places, longer.real(inputs))
    left = [sum(bool(flags[row, i]) for i in own) for row, own in enumerate(kept)]
    assert all(count < int(flags[0].sum()) for count in left)
    cut = {1: naive.Cut(1, lambda state: kept, positions == "compact")}
    with torch.no_grad():
        expected, _ = longer.decoder(
            model, inputs, places, tokens(weights), middle=middle(weights), cuts=cut, remove=False
        )
    assert difference(got, expected) <= 2e-5


def _dropping(folder: Path, positions: str) -> str:
    """The path of a rule that drops some of all tokens, whoever put them in."""
    path = folder / "dropping.yaml"
    path.write_text(
        "rule: dropping\nabout: Drop any tokens.\nparams:\n  seed: {type: int, default: 0, about: seed}\nsteps:\n"
        '  - score: {name: luck, by: random, at: decoder.1.input, seed: "${seed}"}\n'
        "  - select: {name: kept, by: topk, scores: luck, among: all, keep: 9}\n"
        f"  - drop: {{at: decoder.1.input, keep: kept, positions: {positions}}}\n"
    )
    return str(path)


def test_a_drop_behind_tokens_that_are_taken_out_is_refused() -> None:
    """Where tokens go out by number, one that an edit has taken before has none."""
    model = fleet.shared("llava")
    rules = [{"rule": "meta_tokens", "share": 0.25}, {"rule": "random", "keep": 5}]
    with pytest.raises(Exception, match="has taken tokens by their number") as caught:
        prune(model, rules=rules)(**fleet.example(model))
    assert "until" in refusal(caught.value).remedy
    torch._dynamo.reset()
    assert prune(model, rules=rules[::-1])(**fleet.example(model)).logits.shape[1] == 24 - 16 + 5
