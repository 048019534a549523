"""Inserted tokens are parameters: trained, saved and loaded with the model, compiled or exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import longer
import naive
import pytest
import torch
from harness import difference, prune
from inserting import drawn, held, rule
from torch import Tensor, nn

import tokcompile
from tokcompile import Weights

pytestmark = pytest.mark.usefixtures("one_thread")


def _trained_by_hand(
    model: nn.Module, inputs: dict[str, Tensor], tokens: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits, and gradients of the tokens and of the model's weights, of the sum of squared logits."""
    model.zero_grad()
    own = tokens.clone().requires_grad_()
    with longer.put_before(naive._layers(model)[1], own, 1):
        logits = model(**inputs).logits
    logits.square().sum().backward()
    assert own.grad is not None
    return logits.detach(), own.grad, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("target", "within"), [("eager", 0.0), ("aot_eager", 1e-5), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)]
)
def test_gradients_are_those_of_the_model_by_hand(target: str, within: float) -> None:
    model = fleet.build("vit").train()
    inputs, tokens = fleet.example(model, 2), drawn(3, 32)
    logits, own, others = _trained_by_hand(model, inputs, tokens)
    model.zero_grad()
    weights = held("hita", "queries", tokens)
    options = {"rule": "hita", "block": 1, "queries": 3, "weights": weights, "target": target}
    out = torch.compile(model, backend="tokred", options=options)(**inputs).logits
    out.square().sum().backward()
    (parameter,) = weights.parameters()
    assert difference(out.detach(), logits) <= within
    assert difference(parameter.grad, own) <= within
    got = [p.grad for p in model.parameters() if p.grad is not None]
    assert max(map(difference, got, others)) <= within


def test_a_step_of_an_optimiser_trains_the_tokens_of_the_compiled_model() -> None:
    model = fleet.build("llama").train()
    inputs = fleet.example(model, 2)
    tokcompile.compile(model, rule="meta_tokens", share=0.25, places="every", target="eager")
    losses = []
    model(**inputs, labels=inputs["input_ids"], use_cache=False)  # which makes the tokens
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "tokred.meta_tokens.meta")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=0.1)
    for _ in range(5):
        optimiser.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert len(trained) == 1 and trained[0].shape == (1, 64)
    assert losses[-1] < losses[0]


def test_a_model_loads_its_tokens_from_a_state_or_a_file(tmp_path: Path) -> None:
    model, other = fleet.build("vit"), fleet.build("vit")
    inputs = fleet.example(model, 2)
    given: dict[str, Any] = {"rule": "hita", "block": 1, "queries": 3, "target": "eager"}
    tokcompile.compile(model, weights=held("hita", "queries", drawn(3, 32)), **given)
    with torch.no_grad():
        expected = model(**inputs).logits
    state = model.state_dict()
    assert "tokred.hita.queries" in state
    tokcompile.compile(other, **given)
    other.load_state_dict(state)
    path = tmp_path / "tokens.safetensors"
    model.tokred.save(path)
    with torch.no_grad():
        assert difference(other(**inputs).logits, expected) == 0
    tokcompile.restore(model)
    assert (
        difference(
            prune(model, **{k: v for k, v in given.items() if k != "target"}, weights=str(path))(**inputs).logits,
            expected,
        )
        == 0
    )


def test_tokens_of_another_number_are_refused() -> None:
    model = fleet.shared("vit")
    weights = held("hita", "queries", drawn(2, 32))
    with pytest.raises(Exception, match="does not fit this model"):
        prune(model, rule="hita", block=1, queries=3, weights=weights)(**fleet.example(model, 2))


def test_tokens_start_as_they_are_told(tmp_path: Path) -> None:
    model = fleet.shared("vit")
    inputs = fleet.example(model, 2)
    for std in (0, 0.5):
        torch._dynamo.reset()
        weights = Weights()
        path = rule(tmp_path, at="vision.1.input", where="front", count=64, std=std)
        prune(model, rule=path, weights=weights)(**inputs)
        (value,) = weights.parameters()
        assert abs(value.std().item() - std) <= 0.02 * std and value.dtype == torch.float32


def test_an_exported_program_holds_trains_saves_and_loads_them(tmp_path: Path) -> None:
    model = fleet.build("vit")
    inputs, tokens = fleet.example(model, 2), drawn(3, 32)
    with torch.no_grad():
        model(**inputs)
        program = torch.export.export(model, (), inputs, strict=False)
    weights = held("hita", "queries", tokens)
    rewritten = tokcompile.rewrite(program, "hita", block=1, queries=3, weights=weights)
    assert set(rewritten.state_dict) - set(program.state_dict) == {"tokred.hita.queries"}
    module = rewritten.module()
    out = module(**inputs).logits
    out.square().sum().backward()
    logits, own, _ = _trained_by_hand(model, inputs, tokens)
    assert difference(out.detach(), logits) == 0
    assert difference(dict(module.named_parameters())["tokred.hita.queries"].grad, own) <= 1e-5
    torch.export.save(rewritten, tmp_path / "inserted.pt2")
    loaded = torch.export.load(tmp_path / "inserted.pt2")
    assert difference(loaded.module()(**inputs).logits, out) == 0
    assert "tokred.hita.queries" in loaded.state_dict


def test_an_exported_descriptor_stands_where_the_first_output_was() -> None:
    model = fleet.build("clip")
    inputs, tokens = fleet.example(model, 2), drawn(4, 32)
    with torch.no_grad():
        model(**inputs)
        program = torch.export.export(model, (), inputs, strict=False)
    weights = held("image", "aggregation", tokens)
    rewritten = tokcompile.rewrite(program, "image", block=1, tokens=4, weights=weights)
    out = rewritten.module()(**inputs)
    expected = prune(model, rule="image", block=1, tokens=4, weights=weights)(**inputs)
    assert out.last_hidden_state.shape == (2, 128)
    assert difference(out.last_hidden_state.detach(), expected.last_hidden_state) == 0
    assert difference(out.pooler_output.detach(), expected.pooler_output) == 0
