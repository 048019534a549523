"""`tokcompile.rewrite`: an exported program in, a valid exported program out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import fleet
import naive
import pytest
import torch
from harness import difference, prune
from torch import Tensor, nn
from torch.export import ExportedProgram

import tokcompile
from tokcompile.capturing.capture import from_export
from tokcompile.capturing.dynamo import prepare

RULES = {
    "fastv": ({"keep": 5}, lambda m, i: naive.run(m, i, [naive.fastv(2, 5)])),
    "hiprune": ({"keep": 5, "alpha": 0.7}, lambda m, i: naive.run(m, i, patches=naive.hiprune(5, 0.7))),
    "random": ({"keep": 5}, lambda m, i: naive.run(m, i, [naive.random(5)])),
}


class Logits(nn.Module):
    """A LLaVA without its cache, whose class is no tree that an exported program can return."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).logits


@cache
def exported() -> tuple[nn.Module, dict[str, Tensor], ExportedProgram]:
    """One exported LLaVA for all tests."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (1, 0))
    with torch.no_grad():
        model(**inputs)  # transformers installs hooks at the first call, which export cannot trace
        return model, inputs, torch.export.export(Logits(model), (), inputs, strict=False)


def _text(program: ExportedProgram) -> str:
    return program.graph_module.code + str(program.graph_signature)


@pytest.mark.parametrize("rule", RULES)
def test_a_rewritten_program_runs_and_equals_the_compiled_model(rule: str) -> None:
    model, inputs, program = exported()
    params, by_hand = RULES[rule]
    before = _text(program)
    rewritten = tokcompile.rewrite(program, rule, **params)
    out = rewritten.module()(**inputs)
    assert difference(out, by_hand(model, inputs).logits) == 0
    assert difference(out, prune(model, rule=rule, **params)(**inputs, use_cache=False).logits) == 0
    assert _text(program) == before
    assert difference(program.module()(**inputs), model(**inputs).logits.detach()) == 0


@pytest.mark.parametrize("rule", RULES)
def test_parameters_and_signature_are_those_of_the_original(rule: str) -> None:
    _, _, program = exported()
    rewritten = tokcompile.rewrite(program, rule, **RULES[rule][0])
    assert list(rewritten.state_dict) == list(program.state_dict)
    assert all(rewritten.state_dict[name] is held for name, held in program.state_dict.items())
    assert rewritten.graph_signature.parameters == program.graph_signature.parameters
    assert rewritten.graph_signature.user_inputs == program.graph_signature.user_inputs
    assert len(rewritten.graph_signature.user_outputs) == 1


@pytest.mark.parametrize("rule", RULES)
def test_a_rewritten_program_decomposes_exports_and_saves_again(rule: str, tmp_path: Path) -> None:
    model, inputs, program = exported()
    rewritten = tokcompile.rewrite(program, rule, **RULES[rule][0])
    expected = rewritten.module()(**inputs)
    lowered = rewritten.run_decompositions()
    assert difference(lowered.module()(**inputs), expected) <= 1e-5
    assert not any("tokred" in str(n.target) for n in lowered.graph.nodes)
    again = torch.export.export(rewritten.module(), (), inputs)
    assert difference(again.module()(**inputs), expected) == 0
    torch.export.save(rewritten, tmp_path / "pruned.pt2")
    assert difference(torch.export.load(tmp_path / "pruned.pt2").module()(**inputs), expected) == 0


def test_a_program_that_was_exported_with_gradients_on() -> None:
    """transformers computes rotary tables under no_grad, which such an export closes off in a graph of its own."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (1, 0))
    model(**inputs)
    program = torch.export.export(Logits(model), (), inputs)
    assert any("wrap_with_set_grad_enabled" in str(n.target) for n in program.graph.nodes)
    rewritten = tokcompile.rewrite(program, "random", keep=5)
    out = rewritten.module()(**inputs)
    assert difference(out.detach(), naive.run(model, inputs, [naive.random(5)]).logits) == 0
    out.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("enabled", [False, True])
def test_a_region_under_autocast_is_opened_when_it_is_off(enabled: bool) -> None:
    class Region(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                return x @ x.mT

    x = torch.rand(2, 3, 4)
    program = torch.export.export(Region(), (x,))
    opened = from_export(program)
    assert any("autocast" in str(n.target) for n in program.graph.nodes)
    assert any("autocast" in str(n.target) for n in opened.graph.nodes) == enabled
    (out,) = opened.gm(x)
    assert torch.equal(out, Region()(x))


def test_constants_among_the_inputs_are_no_tensors() -> None:
    """`use_cache=False` as an argument is a placeholder of its own."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (1, 0)) | {"use_cache": False}
    with torch.no_grad():
        model(**inputs)
        program = torch.export.export(model, (), inputs, strict=False)
    rewritten = tokcompile.rewrite(program, "fastv", keep=5)
    assert difference(rewritten.module()(**inputs).logits, naive.run(model, inputs, [naive.fastv(2, 5)]).logits) == 0


def test_a_dynamic_length_stays_dynamic() -> None:
    model = fleet.build("llava")
    length = torch.export.Dim("length", min=20, max=128)
    inputs = fleet.example(model, 2, (1, 0))
    shapes = {"input_ids": {1: length}, "attention_mask": {1: length}, "pixel_values": None}
    prepare()  # PyTorch 2.11 alone fixes the length at the one that it sees
    with torch.no_grad():
        model(**inputs)
        program = torch.export.export(Logits(model), (), inputs, dynamic_shapes=shapes, strict=False)
    rewritten = tokcompile.rewrite(program, "random", keep=5)
    for text in (7, 11, 47):
        inputs = fleet.example(model, 2, (0, 2), text=text)
        ran = naive.run(model, inputs, [naive.random(5)])
        assert difference(rewritten.module()(**inputs), ran.logits) <= 1e-5


@pytest.fixture
def vit() -> tuple[nn.Module, dict[str, Tensor], ExportedProgram]:
    model = fleet.build("vit")
    inputs = fleet.example(model, 2)
    with torch.no_grad():
        model(**inputs)
        return model, inputs, torch.export.export(model, (), inputs, strict=False)


@pytest.mark.parametrize("rule", ["fastv", "random"])
def test_a_rule_for_a_decoder_is_refused_on_a_vision_transformer(vit: Any, rule: str) -> None:
    _, _, program = vit
    with pytest.raises(tokcompile.AddressError, match="no decoder stack"):
        tokcompile.rewrite(program, rule)
