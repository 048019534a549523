"""Tokens put into vision towers: compiled, the model says what it says by hand when its blocks are given them too."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import families
import fleet
import longer
import naive
import pytest
import torch
import unloaded
from harness import difference, prune, refusal
from inserting import drawn, held, rule
from torch import Tensor, nn

from tokcompile.capturing.capture import capture
from tokcompile.initial import scaled_centroids
from tokcompile.models import catalogue
from tokcompile.pipeline import apply_rules
from tokcompile.rulefile import parse_rules
from tokcompile.sites import find_sites

pytestmark = pytest.mark.usefixtures("one_thread")
aten = torch.ops.aten
COUNT = 3
FRONT = {
    "vit": 1,
    "deit": 2,
    "clip_vision": 1,
    "siglip_vision": 0,
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "beit": 1,
    "timm_vit": 1,
    "timm_vit_written": 1,
    "timm_vit_scaled": 1,
    "timm_vit_mean": 0,
    "timm_vit_registers": 5,
    "timm_siglip": 0,
    "timm_deit": 2,
    "timm_eva": 1,
    "timm_eva02": 1,
    "timm_dinov3": 5,
    "timm_beit": 1,
}
"""Tokens in front of the patches of each family."""
TAKES_ALL = ("siglip_vision", "timm_vit_mean", "timm_siglip")
"""Families that read all tokens together behind the blocks: inserted ones are taken out before."""
USUAL = ("dinov2_with_registers", "beit", "timm_eva02", "timm_vit_mean")


def _named(*usual: str) -> list[Any]:
    return [pytest.param(name, marks=() if name in usual else (pytest.mark.slow,), id=name) for name in FRONT]


@cache
def subject(name: str) -> families.Subject:
    family = catalogue.family(name)
    if why := unloaded.missing(family.needs):
        pytest.skip(why)
    return families.subject(family)


def _wider(value: Tensor, slot: int) -> Tensor:
    """A bias [.., T, T] with zeros for the rows and columns of inserted tokens."""
    for dim in (-1, -2):
        shape = list(value.shape)
        shape[dim] = COUNT
        before, after = value.split([slot, value.shape[dim] - slot], dim)
        value = torch.cat([before, value.new_zeros(shape), after], dim)
    return value


@contextmanager
def grown(it: families.Subject, tokens: Tensor, slot: int, block: int = 1) -> Iterator[list[Tensor]]:
    """Let blocks from one on see tokens at a place; what follows them gets the model's own. Yields the last stream."""
    blocks = families.blocks_of(it.model, it.sites, "vision")
    seen: list[Tensor] = []

    def shorter(module: nn.Module, args: Any, out: Any) -> Any:
        value = out[0] if isinstance(out, tuple) else out
        seen.append(value)
        value = torch.cat([value[:, :slot], value[:, slot + len(tokens) :]], 1)
        return (value, *out[1:]) if isinstance(out, tuple) else value

    with ExitStack() as stack:
        stack.enter_context(longer.put_before(blocks[block], tokens, slot))
        stack.callback(blocks[-1].register_forward_hook(shorter).remove)
        for each in list(blocks)[block:]:
            for module in each.modules():
                if hasattr(module, "num_prefix_tokens"):
                    stack.callback(setattr, module, "num_prefix_tokens", module.num_prefix_tokens)
                    module.num_prefix_tokens += len(tokens)
                if hasattr(module, "_get_rel_pos_bias"):
                    table = module._get_rel_pos_bias
                    module._get_rel_pos_bias = lambda table=table: _wider(table(), slot)
                    stack.callback(module.__dict__.pop, "_get_rel_pos_bias")
                if "RelativePositionBias" in type(module).__name__:
                    hook = module.register_forward_hook(lambda m, args, out: _wider(out, slot))
                    stack.callback(hook.remove)
        yield seen


@torch.no_grad()
def by_hand(it: families.Subject, tokens: Tensor, slot: int, block: int = 1) -> tuple[list[Tensor], Tensor]:
    with grown(it, tokens, slot, block) as seen:
        outputs = families.outputs(it.model(**it.inputs))
    return outputs, seen[-1]


def compiled(it: families.Subject, **given: Any) -> list[Tensor]:
    torch._dynamo.reset()
    return families.outputs(prune(it.model, **given)(**it.inputs))


@pytest.mark.parametrize("where", ["front", "patches"])
@pytest.mark.parametrize("name", _named(*USUAL))
def test_a_tower_equals_the_run_by_hand(name: str, where: str, tmp_path: Path) -> None:
    """Readers by place find the class token and the patches, biases are 0, and tables of patches turn these alone."""
    it, tokens = subject(name), drawn(COUNT, 64)
    until = {"until": "vision.-1.output"} if name in TAKES_ALL else {}
    path = rule(tmp_path, at="vision.1.input", where=where, count=COUNT, **until)
    got = compiled(it, rule=path, weights=held("putting", "t", tokens))
    slot = FRONT[name] if where == "patches" else 0
    expected, stream = by_hand(it, tokens, slot)
    if name == "clip_vision":  # which returns the stream itself
        expected[0] = stream
    assert families.compared(got, expected) <= 1e-5


@pytest.mark.parametrize("name", _named("dinov2_with_registers", "timm_eva02"))
def test_holistic_queries_stand_before_the_patches(name: str) -> None:
    if name in TAKES_ALL:
        pytest.skip("it reads all tokens together")
    it, tokens = subject(name), drawn(COUNT, 64)
    got = compiled(it, rule="hita", block=1, queries=COUNT, weights=held("hita", "queries", tokens))
    expected, stream = by_hand(it, tokens, FRONT[name])
    if name == "clip_vision":
        expected[0] = stream
    assert families.compared(got, expected) <= 1e-5


@pytest.mark.parametrize("name", ["vit", "dinov2_with_registers", "timm_eva02"])
def test_no_queries_keep_every_bit(name: str) -> None:
    it = subject(name)
    with torch.no_grad():
        expected = families.outputs(it.model(**it.inputs))
    assert families.compared(compiled(it, rule="hita", queries=0), expected) == 0


# The descriptor.


def _norm(it: families.Subject) -> nn.Module:
    """The norm behind the blocks."""
    blocks = families.blocks_of(it.model, it.sites, "vision")
    inside = {id(m) for m in blocks.modules()}
    return [m for m in it.model.modules() if isinstance(m, nn.LayerNorm) and id(m) not in inside][-1]


@pytest.mark.parametrize(
    ("name", "block"),
    [("dinov2_with_registers", block) for block in (0, 1, 3)]
    + [pytest.param(name, 1, marks=pytest.mark.slow) for name in ("vit", "timm_vit_registers", "timm_dinov3")],
)
def test_a_descriptor_equals_the_run_by_hand(name: str, block: int) -> None:
    it, tokens = subject(name), drawn(4, 64)
    got = compiled(it, rule="image", block=block, tokens=4, weights=held("image", "aggregation", tokens))[0]
    _, stream = by_hand(it, tokens, 0, block)
    with torch.no_grad():
        rows = _norm(it)(stream)[:, :4].flatten(1)
    assert got.shape == (len(rows), 4 * 64)
    assert difference(got, rows / rows.norm(dim=-1, keepdim=True)) <= 1e-6
    assert difference(got.norm(dim=-1), torch.ones(len(rows))) <= 1e-6


def test_old_tokens_end_with_the_last_attention_where_the_descriptor_is_all() -> None:
    """The feed-forward of the last block is of the inserted tokens alone; of a model that returns more, of all."""
    rows = {}
    for name in ("vit", "clip"):
        model = fleet.shared(name)
        program = capture(model, fleet.example(model, 2))[0]
        apply_rules(program, parse_rules({"rule": "image", "block": 1, "tokens": 4}))
        wide = [n for n in program.graph.nodes if n.target is aten.linear.default and n.meta["val"].shape[-1] == 64]
        rows[name] = [n.meta["val"].shape[1] for n in wide]
    assert rows == {"vit": [17, 21, 4], "clip": [17, 21, 21]}


def test_tokens_in_another_order_are_parts_of_the_descriptor_in_that_order() -> None:
    it, tokens = subject("dinov2_with_registers"), drawn(4, 64)
    order = [2, 0, 3, 1]
    one, other = (
        compiled(it, rule="image", block=1, tokens=4, weights=held("image", "aggregation", value))[0]
        for value in (tokens, tokens[order])
    )
    assert difference(one.unflatten(1, (4, 64))[:, order].flatten(1), other) <= 1e-6


def test_a_descriptor_does_not_depend_on_other_rows() -> None:
    model = fleet.shared("clip")
    inputs = fleet.example(model, 3)
    weights = held("image", "aggregation", drawn(4, 32))
    pruned = prune(model, dynamic=True, rule="image", block=1, tokens=4, weights=weights)
    together = pruned(**inputs)[0]
    for row in range(3):
        alone = pruned(pixel_values=inputs["pixel_values"][row : row + 1])[0]
        assert difference(together[row : row + 1], alone) <= 1e-6


def test_a_descriptor_in_bfloat16() -> None:
    model = fleet.shared("clip", torch.bfloat16)
    inputs = fleet.example(model, 2)
    tokens = drawn(4, 32).bfloat16()
    got = prune(model, rule="image", block=1, tokens=4, weights=held("image", "aggregation", tokens))(**inputs)[0]
    seen: list[Tensor] = []
    layers = model.encoder.layers if hasattr(model, "encoder") else model.vision_model.encoder.layers
    hook = layers[-1].register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad(), longer.put_before(layers[1], tokens, 0):
        model(**inputs)
    hook.remove()
    stream = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    rows = stream[:, :4].flatten(1).float()
    assert got.dtype == torch.bfloat16
    assert difference(got, rows / rows.norm(dim=-1, keepdim=True)) <= 4e-3


def test_what_is_read_out_may_stay_apart(tmp_path: Path) -> None:
    it, tokens = subject("dinov2_with_registers"), drawn(2, 64)
    path = rule(tmp_path, at="vision.1.input", where="end", count=2, readout="tokens")
    got = compiled(it, rule=path, weights=held("putting", "t", tokens))[0]
    _, stream = by_hand(it, tokens, 21)
    with torch.no_grad():
        assert difference(got, _norm(it)(stream)[:, -2:]) <= 1e-6


# The only way from inserted tokens to others is attention.


@pytest.mark.parametrize(
    ("name", "at", "stack"), [("vit", "vision.1.input", "vision"), ("llama", "decoder.1.input", "decoder")]
)
def test_tokens_that_nobody_may_see_change_nothing(name: str, at: str, stack: str, tmp_path: Path) -> None:
    """With the inserted keys hidden from the old queries, the old tokens are those of the unmodified model."""
    model = fleet.shared(name)
    inputs = fleet.example(model, 2) | ({} if stack == "vision" else {"use_cache": False})
    with torch.no_grad():
        expected = model(**inputs).logits
    until = {"until": "head.input"} if stack == "decoder" else {}
    path = rule(tmp_path, at=at, where="front", count=3, std=50.0, **until)
    captured = capture(model, inputs)[0]
    apply_rules(captured, parse_rules({"rule": path}))
    blocks = find_sites(captured).stacks[stack].blocks
    for block in blocks[1:]:
        _hide(captured, block.attention, 3, causal=stack == "decoder")
    captured.gm.recompile()
    got = _called(captured, model, inputs)
    assert difference(got, expected) <= 1e-5


def _hide(program: Any, site: Any, count: int, causal: bool) -> None:
    """Let old queries see no inserted key."""
    total = site.key.meta["val"].shape[2]
    seen = torch.ones(total, total, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    seen[count:, :count] = False
    name = f"seen_{len(program.gm._buffers)}"
    program.gm.register_buffer(name, seen)
    with program.graph.inserting_before(site.node):
        mask = program.graph.get_attr(name)
    site.node.args = (*site.node.args[:3], mask)
    site.node.kwargs = {k: v for k, v in site.node.kwargs.items() if k not in ("attn_mask", "is_causal")}


def _called(program: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits of a program: what it is given is told by where it comes from."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def value(name: str) -> Any:
        if name in inputs_of:
            return inputs_of[name]
        known = name.removeprefix("l_self_").removesuffix("_")
        plain = {n.replace(".", "_"): v for n, v in named.items()}
        for part in ("modules_", "parameters_", "buffers_"):
            known = known.replace(part, "")
        return plain[known]

    inputs_of = {f"l_{front}{n}_": v for n, v in inputs.items() for front in ("", "kwargs_")}
    given = [value(n.name) for n in program.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        out = program.gm(*given)
    return next(v for v in out if v.shape[-1] in (10, 64) and v.ndim in (2, 3))


# What cannot be done.


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("timm_vit_mean", "would mix those that a rule puts in"),
        ("swin", "takes the token axis apart"),
        ("timm_swin", "inserted into a value"),
    ],
)
def test_a_model_that_cannot_follow_refuses(name: str, why: str, tmp_path: Path) -> None:
    it = subject(name)
    with pytest.raises(Exception, match=why) as caught:
        compiled(it, rule=rule(tmp_path, at="vision.1.input", where="front", count=2))
    error = refusal(caught.value)
    assert error.remedy and any("putting.yaml:4" in place for place in error.where)


def test_tables_of_patches_have_no_row_for_tokens_among_these(tmp_path: Path) -> None:
    it = subject("timm_eva02")
    with pytest.raises(Exception, match="parts class tokens from patches") as caught:
        compiled(it, rule=rule(tmp_path, at="vision.1.input", where="end", count=2))
    assert "where: front" in refusal(caught.value).remedy


def test_tokens_among_features_have_no_place_in_a_text(tmp_path: Path) -> None:
    model = fleet.shared("llava-siglip-qwen2")
    with pytest.raises(Exception, match="no place for them") as caught:
        prune(model, rule=rule(tmp_path, at="vision.1.input", where="front", count=2))(**fleet.example(model, 2))
    assert "until" in refusal(caught.value).remedy


@pytest.mark.parametrize("name", ["llava", "llava-siglip-qwen2"])
def test_tokens_that_are_taken_out_before_the_text_change_the_features(name: str, tmp_path: Path) -> None:
    model = fleet.shared(name)
    inputs, tokens = fleet.example(model, 2), drawn(2, 32)
    path = rule(tmp_path, at="vision.1.input", where="front", count=2, until="projector.input")
    got = prune(model, rule=path, weights=held("putting", "t", tokens))(**inputs).logits
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    # LLaVA leaves the first token out, which is now an inserted one: the other and the class token are left.
    with torch.no_grad(), longer.put_before(layers[1], tokens, 0), longer.features_without_the_first(model, 2):
        expected = model(**inputs).logits
    assert difference(got, expected) <= 1e-5


def test_holistic_queries_are_no_features_of_a_llava() -> None:
    """Its projector leaves the class token out; the queries that follow it are left out too."""
    model = fleet.shared("llava")
    inputs, tokens = fleet.example(model, 3, (2, 0, 1)), drawn(4, 32)
    got = prune(model, rule="hita", block=1, queries=4, weights=held("hita", "queries", tokens))(**inputs).logits
    layers = naive._layers(model)
    with torch.no_grad(), longer.put_before(layers[1], tokens, 1), longer.features_without_the_first(model, 4):
        expected = model(**inputs).logits
    assert difference(got, expected) == 0


# The start of aggregation tokens.


def test_the_start_is_the_direction_of_each_cluster_times_a_sharp_scale() -> None:
    rng = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 6)
    descriptors = torch.cat([9 * c + 0.1 * torch.randn(50, 6, generator=rng) for c in centres])
    made = scaled_centroids(descriptors, 3, seed=2)
    unit = made / made.norm(dim=-1, keepdim=True)
    alike = descriptors / descriptors.norm(dim=-1, keepdim=True) @ unit.T
    first, second = alike.sort(descending=True).values.unbind(1)[:2]
    alpha = -math.log(0.01) / (first - second).mean().item()
    assert difference(made.norm(dim=-1), torch.full((3,), alpha)) <= 1e-4
    assert difference((unit @ centres.T).amax(1), torch.ones(3)) <= 1e-3
    assert {int(i) for i in (unit @ centres.T).argmax(1)} == {0, 1, 2}


def test_one_cluster_is_the_mean_direction() -> None:
    descriptors = drawn(40, 6) + 3
    made = scaled_centroids(descriptors, 1)
    unit = descriptors / descriptors.norm(dim=-1, keepdim=True)
    mean = unit.mean(0) / unit.mean(0).norm()
    assert difference(made, (mean * -math.log(0.01) / (unit @ mean).mean())[None]) <= 1e-4


@pytest.mark.parametrize(("shape", "count"), [((3, 4), 4), ((3, 4), 0), ((3,), 1)])
def test_too_few_descriptors_are_refused(shape: tuple[int, ...], count: int) -> None:
    with pytest.raises(ValueError, match="clusters of"):
        scaled_centroids(torch.randn(shape), count)


def test_one_point_tells_no_clusters_apart() -> None:
    with pytest.raises(ValueError, match="do not tell"):
        scaled_centroids(torch.ones(5, 3), 2)
