"""Layers of inserted tokens: trained, exported, in towers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import layered
import longer
import naive
import pytest
import torch
from core.test_export import exported
from core.test_layer_text import HEADS, PLACES, POSITIONS, TEXT, middle, rule, tokens, trained
from harness import difference, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile import Weights

pytestmark = pytest.mark.usefixtures("one_thread")

# Training, and exported programs.


def test_gradients_are_those_of_the_run_by_hand(tmp_path: Path) -> None:
    """Of every parameter of the rule, and of the model's weights below and above the layers.

    What a layer of the last block gives is gone with the tokens before the head, so that nothing can train it.
    """
    model = fleet.build("llama").train()
    inputs = fleet.example(model, 2, text=TEXT)
    fields, places = PLACES["listed"]
    path = rule(tmp_path, {**fields, **POSITIONS["counted"]}, blocks=2)
    weights = trained(model, inputs, path)
    others = [model.model.embed_tokens.weight, model.model.layers[1].self_attn.q_proj.weight, model.lm_head.weight]
    pruned = prune(model, rule=path, weights=weights)
    pruned.call(**inputs, use_cache=False).logits.square().sum().backward()
    got = [p.grad.clone() for p in (*weights.parameters(), *others)]
    model.zero_grad()
    own = Weights()
    own.load_state_dict(weights.state_dict())
    held = dict(own.named_parameters())

    def run(block: int, x: Tensor, flags: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        start = f"layered.own_{block}_"
        parts = {name.removeprefix(start): p for name, p in held.items() if name.startswith(start)}
        cos, sin = (t[:, None] for t in tables)

        def turn(q: Tensor) -> Tensor:
            one, two = q.chunk(2, -1)
            return q * cos + torch.cat([-two, one], -1) * sin

        return layered.attend(x, flags, parts, HEADS, turn) if parts else x

    logits, _ = longer.decoder(model, inputs, places(longer.real(inputs)), held["layered.t"], middle=run)
    logits.square().sum().backward()
    expected = [p.grad for p in (*own.parameters(), *others)]
    assert len(got) == len(expected) == 1 + 2 * 6 + 3
    for one, other in zip(got, expected, strict=True):
        assert other.abs().max() > 0
        assert difference(one, other) <= 1e-3 * other.abs().max().item()


@pytest.mark.slow
def test_inductor_trains_what_eager_trains() -> None:
    model = fleet.build("llama").train()
    inputs = fleet.example(model, 2, text=TEXT)
    options: dict[str, Any] = {"share": 0.25, "layers": 2}
    weights, ran = trained(model, inputs, "meta_tokens", **options), []
    for target in ("eager", "inductor"):
        torch._dynamo.reset()
        for parameter in weights.parameters():
            parameter.grad = None
        pruned = prune(model, target=target, rule="meta_tokens", weights=weights, **options)
        logits = pruned.call(**inputs, use_cache=False).logits
        logits.square().sum().backward()
        ran.append([logits.detach(), *(p.grad for p in weights.parameters())])
    for one, other in zip(*ran, strict=True):
        assert difference(one, other) <= 1e-4 * one.abs().max().item()


@pytest.mark.slow
def test_a_rewritten_program_has_the_layers_in_its_state_and_decomposes(tmp_path: Path) -> None:
    model, inputs, program = exported()
    path = rule(tmp_path, {"where": "listed", "places": [1, 20], **POSITIONS["counted"]}, blocks=1)
    weights = Weights()
    tokcompile.rewrite(program, path, weights=weights)
    layered.train(weights)
    model, inputs, program = exported()
    rewritten = tokcompile.rewrite(program, path, weights=weights)
    assert {k for k in rewritten.state_dict if k.startswith("tokred.")} == {f"tokred.{k}" for k in weights.state_dict()}
    with torch.no_grad():
        expected, _ = longer.decoder(
            model, inputs, longer.at(longer.real(inputs), [1, 21]), tokens(weights), middle=middle(weights)
        )
    assert difference(rewritten.module()(**inputs), expected) <= 2e-5
    lowered = rewritten.run_decompositions()
    assert not any("tokred" in str(n.target) for n in lowered.graph.nodes if n.op == "call_function")
    assert difference(lowered.module()(**inputs), expected) <= 2e-5


# What cannot be done, and towers.


def test_inserted_tokens_of_a_tower_see_those_before_them(tmp_path: Path) -> None:
    model = fleet.shared("vit")
    inputs = fleet.example(model, 2)
    insert = {"at": "vision.1.input", "where": "front", "count": 3, "until": "vision.-1.output"}
    path = rule(tmp_path, insert, at="vision.*.middle", blocks=1)
    weights = trained(model, inputs, path)
    got = prune(model, rule=path, weights=weights)(**inputs).logits
    assert {name.split("_")[1] for name in weights.state_dict() if "own" in name} == {"1"}
    flags = torch.arange(20).expand(2, -1) < 3
    held = layered.parts(weights, "layered", "own", 1)
    layers = naive._layers(model)

    def attended(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        more = layered.attend(stream[0] + first, flags, held, HEADS) - stream[0]
        return (more, *out[1:]) if isinstance(out, tuple) else more

    stream: list[Tensor] = []
    with torch.no_grad(), longer.put_before(layers[1], tokens(weights), 0):
        keep = layers[1].layernorm_before.register_forward_pre_hook(lambda m, args: stream.append(args[0]))
        change = layers[1].attention.register_forward_hook(attended)
        last = layers[-1].register_forward_hook(lambda m, args, out: out[:, 3:])
        try:
            expected = model(**inputs).logits
        finally:
            for hook in (keep, change, last):
                hook.remove()
    assert difference(got, expected) <= 2e-5


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "more blocks than there are": ({}, {"blocks": 4}, "in more blocks than hold its tokens", "blocks: 3"),
    "before the tokens": (
        {"at": "decoder.1.input"},
        {"at": "decoder.0.middle"},
        "not among those of this place",
        "until",
    ),
    "behind the tokens": (
        {"until": "decoder.1.input"},
        {"at": "decoder.2.middle"},
        "not among those of this place",
        "until",
    ),
    "no such stack": ({}, {"at": "vision.*.middle"}, "has no vision stack", "rule for what this graph has"),
    "no such block": ({}, {"at": "decoder.7.middle"}, "decoder has 3 blocks", "tokred sites"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_makes_no_sense_on_a_model_is_refused(kind: str, tmp_path: Path) -> None:
    insert, layer, cause, remedy = REFUSED[kind]
    model = fleet.shared("llama")
    path = rule(tmp_path, {"where": "front", "count": 2, **insert}, **layer)
    with pytest.raises(Exception, match=cause) as caught:
        prune(model, rule=path)(**fleet.example(model))
    error = refusal(caught.value)
    assert remedy in error.remedy and any("layered.yaml:5" in place for place in error.where)


def test_phases_by_content_turn_no_other_layer() -> None:
    model = fleet.shared("llama")
    rules = [{"rule": "carope"}, {"rule": "meta_tokens", "share": 0.25, "fresh": "none", "positions": "keep"}]
    with pytest.raises(Exception, match="says nothing of those|turned by tables that are not known"):
        prune(model, rules=rules)(**fleet.example(model), use_cache=False)
