"""A gated projector in place of the model's own, against modules of plain torch put into the model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import fleet
import layered
import merging_naive
import pytest
import torch
import torch.nn.functional as F
from harness import cases, difference, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile import Weights
from tokcompile.capturing.capture import capture
from tokcompile.models import catalogue
from tokcompile.pipeline import apply_rules
from tokcompile.rulefile import parse_rules

pytestmark = pytest.mark.usefixtures("one_thread")
PADS = {1: (), 3: (2, 0, 1)}


def rule(folder: Path, **fields: Any) -> str:
    """The path of a rule that puts a gated projector `p` in."""
    path = folder / "gated.yaml"
    step = json.dumps({"by": "gated", "name": "p", "at": "projector.input", **fields})
    path.write_text(f"rule: gated\nabout: Put a gated projector in.\nsteps:\n  - layer: {step}\n")
    return str(path)


def swiglu(x: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    """(SiLU(x W1) * (x W2)) W3 of normalised x."""
    x = layered.normed(x, held)
    gate, up = (F.linear(x, held[part], held.get(f"{part}_bias")) for part in ("gate", "up"))
    return F.linear(gate * torch.sigmoid(gate) * up, held["down"], held.get("down_bias"))


def parts(weights: Weights, name: str = "gated.p") -> dict[str, Tensor]:
    return {k.removeprefix(f"{name}_"): v for k, v in weights.state_dict(keep_vars=True).items()}


@contextmanager
def replaced(module: nn.Module, held: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module of a model be the gated projector."""
    module.forward = lambda x: swiglu(x, held)
    try:
        yield
    finally:
        del module.forward  # the class's own again, which compiled code is guarded by


def trained(model: nn.Module, inputs: dict[str, Any], **options: Any) -> Weights:
    """Weights of a rule, all of them other than at the start."""
    weights = Weights()
    prune(model, weights=weights, **options)(**inputs)
    layered.train(weights)
    torch._dynamo.reset()
    return weights


@pytest.mark.parametrize(
    "case",
    cases(
        3,
        name=("llava", "llava-siglip-qwen2", "llava-last"),
        batch=(1, 3),
        norm=("layer", "rms", "none"),
        width=(None, 24),
        bias=(False, True),
    ),
)
def test_a_text_equals_the_run_by_hand(case: dict[str, Any], tmp_path: Path) -> None:
    model = fleet.shared(case["name"])
    inputs = fleet.example(model, case["batch"], PADS[case["batch"]])
    fields = {"norm": case["norm"], "bias": case["bias"]} | ({} if case["width"] is None else {"width": case["width"]})
    path = rule(tmp_path, **fields)
    weights = trained(model, inputs, rule=path)
    out = prune(model, rule=path, weights=weights)(**inputs)
    with torch.no_grad(), replaced(model.model.multi_modal_projector, parts(weights)):
        expected = model(**inputs).logits
    assert difference(out.logits, expected) <= 1e-5
    width = case["width"] or 64
    shapes = {"gate": (width, 32), "up": (width, 32), "down": (64, width)}
    shapes |= {f"{part}_bias": shape[:1] for part, shape in shapes.items() if case["bias"]}
    shapes |= {"layer": {"norm": (32,), "norm_bias": (32,)}, "rms": {"norm": (32,)}, "none": {}}[case["norm"]]
    assert {part: tuple(value.shape) for part, value in parts(weights).items()} == shapes


def test_nothing_reads_the_model_s_own_projector_any_more(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    program = capture(model, fleet.example(model, 2))[0]
    (done,) = apply_rules(program, parse_rules({"rule": rule(tmp_path)}))
    own = [n for n in program.graph.nodes if "multi_modal_projector" in n.meta.get("source", "")]
    assert len(own) == 4 and not any(n.users for n in own)
    assert done.steps[-1]["parameters"] == 32 * 2 + 2 * 64 * 32 + 64 * 64


@pytest.mark.parametrize("name", ["qwen2_vl", pytest.param("llava_next", marks=pytest.mark.slow)])
def test_features_of_all_images_in_one(name: str, tmp_path: Path) -> None:
    """Packed [n, C], of four patches each; and crops that are put together on a grid, with lines between."""
    it = families.subject(catalogue.family(name))
    path = rule(tmp_path)
    weights = trained(it.model, it.inputs, rule=path)
    out = prune(it.model, rule=path, weights=weights)(**it.inputs)
    module = it.model.model.visual.merger.mlp if name == "qwen2_vl" else it.model.model.multi_modal_projector
    with torch.no_grad(), replaced(module, parts(weights)):
        expected = it.model(**it.inputs).logits
    assert difference(out.logits, expected) <= 1e-4 * expected.abs().max().item()


# Pooled in front of it.


def _pooled(model: nn.Module, inputs: dict[str, Tensor], n: int, held: Mapping[str, Tensor]) -> Tensor:
    with replaced(model.model.multi_modal_projector, held):
        return merging_naive.run.__wrapped__(model, inputs, merging_naive.pooled(n)).logits


def test_one_set_of_weights_serves_several_numbers_of_tokens(tmp_path: Path) -> None:
    """The same state for every n, and each graph is what one of its own says."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (1, 0))
    weights = trained(model, inputs, rule="tokenflex", n=3, mlp="gated")
    state = {name: value.clone() for name, value in weights.state_dict().items()}
    served = {n: prune(model, rule="tokenflex", n=n, mlp="gated", weights=weights) for n in (1, 2, 3)}
    got = {n: pruned(**inputs).logits for n, pruned in served.items()}
    for n, logits in got.items():
        assert torch.equal(served[n](**inputs).logits, logits) and len(served[n].report.graphs) == 1
        with torch.no_grad():
            expected = _pooled(model, inputs, n, parts(weights, "tokenflex.projector"))
        assert difference(logits, expected) <= 1e-5
    assert weights.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in weights.state_dict().items())
    path = tmp_path / "projector.safetensors"
    weights.save(path)
    torch._dynamo.reset()
    alone = prune(model, rule="tokenflex", n=2, mlp="gated", weights=str(path))
    assert torch.equal(alone(**inputs).logits, got[2])


def test_a_batch_is_what_its_rows_are_alone() -> None:
    """Gradients aside: four rows together are four rows alone."""
    model = fleet.shared("llava-siglip-qwen2")
    inputs = fleet.example(model, 4)
    weights = trained(model, inputs, rule="tokenflex", n=3, mlp="gated")
    together = prune(model, rule="tokenflex", n=3, mlp="gated", weights=weights)(**inputs).logits
    torch._dynamo.reset()
    one = prune(model, rule="tokenflex", n=3, mlp="gated", weights=weights)
    for row in range(4):
        assert difference(together[row : row + 1], one(**fleet.row(inputs, row)).logits) <= 1e-5


def test_gradients_match_those_by_hand_and_finite_differences() -> None:
    model = fleet.build("llava", dtype=torch.float64).train()
    inputs = fleet.example(model, 2, (1, 0))
    weights = trained(model, inputs, rule="tokenflex", n=3, mlp="gated")
    pruned = prune(model, rule="tokenflex", n=3, mlp="gated", weights=weights)
    tower = model.model.vision_tower.embeddings.patch_embedding.weight
    trainable = [*weights.parameters(), tower]

    def loss() -> Tensor:
        return pruned.call(**inputs, use_cache=False).logits.square().sum()

    loss().backward()
    got = [p.grad.clone() for p in trainable]
    assert all(p.grad is None for p in model.model.multi_modal_projector.parameters())
    for p in trainable:
        p.grad = None
    _pooled(model, inputs, 3, parts(weights, "tokenflex.projector")).square().sum().backward()
    assert len(got) == 6
    rng = torch.Generator().manual_seed(0)
    for parameter, gradient in zip(trainable, got, strict=True):
        assert difference(gradient, parameter.grad) <= 1e-6 * gradient.abs().max().item()  # the pool is float32
        if parameter is tower:  # small steps of it are lost in the pool
            continue
        way = torch.randn(parameter.shape, generator=rng, dtype=torch.float64)
        with torch.no_grad():
            parameter += 3e-4 * way
            above = loss()
            parameter -= 6e-4 * way
            below = loss()
            parameter += 3e-4 * way
        expected = (gradient * way).sum().item()
        # The model's own norms are float32.
        assert abs((above - below).item() / 6e-4 - expected) <= 1e-3 * gradient.norm().item()


def test_generate_equals_a_run_by_hand() -> None:
    model = fleet.build("llava")
    inputs = fleet.example(model, 3, PADS[3])
    weights = trained(model, inputs, rule="tokenflex", n=3, mlp="gated")
    with replaced(model.model.multi_modal_projector, parts(weights, "tokenflex.projector")):
        expected = merging_naive.generate(model, inputs, 3, merging_naive.pooled(3))
    tokcompile.compile(model, rule="tokenflex", n=3, mlp="gated", weights=weights, target="eager")
    out = model.generate(**inputs, **greedy(3))
    assert difference(torch.stack(out.logits, 1), expected) <= 1e-4


# What is refused.


def test_without_a_projector_there_is_nothing_to_replace(tmp_path: Path) -> None:
    for name in ("llama", "vit"):
        torch._dynamo.reset()
        model = fleet.shared(name)
        with pytest.raises(Exception, match="has no projector") as caught:
            prune(model, rule=rule(tmp_path))(**fleet.example(model))
        assert refusal(caught.value).remedy


def test_features_that_were_merged_behind_the_projector_are_others(tmp_path: Path) -> None:
    model = fleet.shared("llava")
    rules = [{"rule": "vqtoken", "codes": 4}, {"rule": rule(tmp_path)}]
    with pytest.raises(Exception, match="makes other tokens of the features") as caught:
        prune(model, rules=rules)(**fleet.example(model))
    assert "before steps that merge" in refusal(caught.value).remedy
    torch._dynamo.reset()
    assert prune(model, rules=rules[::-1])(**fleet.example(model)).logits.shape[1] == 24 - 16 + 4
