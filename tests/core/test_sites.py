"""Sites and addresses: what is found in the graph of each model, however its attention is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import pytest
import torch
import torch.nn.functional as F
from graphs import calls, results, traced
from harness import pairwise
from torch import Tensor, nn
from torch.fx import Node

from tokcompile import AddressError
from tokcompile.capturing.capture import capture
from tokcompile.errors import EditError
from tokcompile.models import catalogue, zoo
from tokcompile.pipeline import apply_rules
from tokcompile.program import Program
from tokcompile.rulefile import parse_rules
from tokcompile.sites import Sites, addresses, find_sites, resolve_address
from tokcompile.sites.concrete import evaluate

aten = torch.ops.aten
LAYERS = {"vision": 3, "decoder": 3}
STACKS = {
    **dict.fromkeys(fleet.VLMS, ("vision", "decoder")),
    **dict.fromkeys(fleet.DECODERS, ("decoder",)),
    **dict.fromkeys(fleet.TOWERS, ("vision",)),
}
HEADS = {"vision": (4, 8), "decoder": (4, 16)}  # how many, and how wide


def _sites(model: nn.Module, inputs: dict[str, Any], dynamic: bool | None = None) -> tuple[Program, Sites]:
    (program,) = capture(model, inputs, dynamic=dynamic)
    return program, find_sites(program)


def _cases() -> list[Any]:
    axes = {
        "name": fleet.VLMS + fleet.DECODERS,
        "attention": ("sdpa", "eager"),
        "cache": (True, False),
        "batch": (1, 3),
        "hidden": (False, True),
        "dynamic": (None, True),
    }
    cases = [*pairwise(axes)]
    return [pytest.param(case, id="-".join(map(str, case.values()))) for case in cases]


@pytest.mark.parametrize("case", _cases())
def test_every_site_of_a_model_is_found(case: dict[str, Any]) -> None:
    model = fleet.shared(case["name"], attention=case["attention"])
    inputs = fleet.example(model, case["batch"], (0, 2, 1)[: case["batch"]])
    program, sites = _sites(
        model, {**inputs, "use_cache": case["cache"], "output_hidden_states": case["hidden"]}, case["dynamic"]
    )
    _check_stacks(program, sites, case["name"], case["batch"])
    assert sites.phase == "prefill" and sites.loose == []
    assert len(sites.caches) == (LAYERS["decoder"] if case["cache"] else 0)
    padding = {n.name: n for n in program.inputs()}
    assert sites.padding is padding[next(name for name in padding if "attention_mask" in name)]
    (rotary,) = sites.rotary["decoder"]
    assert len(rotary.tables) == 2 and not rotary.positions.meta["val"].dtype.is_floating_point
    assert sites.embedding.target is aten.embedding.default
    assert sites.head.target is aten.linear.default and sites.head in program.output.all_input_nodes
    _check_image(sites, model, case["name"])


@pytest.mark.parametrize("name", fleet.VLMS + fleet.DECODERS)
def test_a_model_on_another_device_has_the_same_stacks(name: str) -> None:
    """A padding mask tells a decoder, and transformers brings it to its model's device by a positional argument."""
    model = fleet.build(name).to("meta")
    example = fleet.example(model, 2, (0, 1))
    inputs = {key: value.to("meta") for key, value in example.items()}
    program, sites = _sites(model, {**inputs, "use_cache": False})
    _check_stacks(program, sites, name, 2)


def _check_stacks(program: Program, sites: Sites, name: str, batch: int) -> None:
    assert tuple(sites.stacks) == STACKS[name]
    assert len(sites.attentions) == sum(LAYERS[kind] for kind in STACKS[name])
    for kind, stack in sites.stacks.items():
        heads, width = HEADS[kind]
        assert len(stack.blocks) == LAYERS[kind]
        for block in stack.blocks:
            site = block.attention
            assert tuple(site.query.meta["val"].shape[i] for i in (1, 3)) == (heads, width)
            assert site.scale == pytest.approx(width**-0.5)
            assert hides_nothing(sites, site.mask) == (kind == "vision") and site.softcap == 0.0
            for value in (block.input, block.merge, block.output):
                assert value.meta["val"].ndim == 3
        for block, following in zip(stack.blocks, stack.blocks[1:], strict=False):
            assert block.output is following.input


def hides_nothing(sites: Sites, mask: Node | None) -> bool:
    """Whether there is no mask, or one that lets each token see all, as transformers 5.17 gives a traced ViT."""
    value = None if mask is None else evaluate(mask, sites.reach)
    return mask is None or (
        value is not None and bool(value.all() if value.dtype == torch.bool else (value == 0).all())
    )


def _check_image(sites: Sites, model: nn.Module, name: str) -> None:
    if name not in fleet.VLMS:
        assert sites.splice is None and sites.projector is None
        return
    # LLaVA reads the last block but one, unless it is told otherwise: the last is computed for nothing.
    live = [block.live for block in sites.stacks["vision"].blocks]
    assert live == ([True, True, False] if name == "llava" else [True] * 3)
    assert sites.stacks["vision"].features == (1 if name == "llava" else 2)
    assert sites.splice.node.target is aten.masked_scatter.default
    assert sites.projector.input.meta["val"].shape[1] == fleet.images(model)
    assert sites.projector.output is sites.splice.features
    assert sites.reach.above(
        sites.stacks["vision"].blocks[sites.stacks["vision"].features].output, sites.projector.input
    )


# The two of real size are in test_scale.py.
@pytest.mark.parametrize("name", [n for n, entry in zoo.ZOO.items() if not entry.on_meta and n != "llava-clip-l"])
def test_every_model_of_the_zoo_has_as_many_sites_as_layers(name: str) -> None:
    loaded = zoo.load(name)
    config = loaded.model.config
    text, vision = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    layers = {"vlm": {"vision": vision, "decoder": text}, "decoder": {"decoder": text}, "vision": {"vision": vision}}
    _, sites = _sites(loaded.model, loaded.example(batch=2, padded=True))
    found = {kind: len(stack.blocks) for kind, stack in sites.stacks.items()}
    assert found == {kind: part.num_hidden_layers for kind, part in layers[loaded.kind].items()}
    assert sites.loose == [] and (sites.padding is not None) == (loaded.kind != "vision")
    assert (sites.splice is not None) == (sites.projector is not None) == (loaded.kind == "vlm")


@pytest.mark.parametrize("name", fleet.TOWERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_vision_model_is_one_stack(name: str, attention: str) -> None:
    model = fleet.shared(name, attention=attention)
    program, sites = _sites(model, fleet.example(model, 2))
    _check_stacks(program, sites, name, 2)
    assert all(block.live for block in sites.stacks["vision"].blocks)
    assert sites.padding is None and sites.splice is None and sites.text_stack() is None


@pytest.mark.parametrize(
    ("name", "attention", "softcap", "rotary"),
    [
        ("gpt2", "sdpa", 0.0, 0),
        ("gpt2", "eager", 0.0, 0),
        ("opt", "sdpa", 0.0, 0),
        ("opt", "eager", 0.0, 0),
        ("gemma2", "eager", 50.0, 1),
    ],
)
def test_other_decoders_are_one_stack_with_a_padding_mask(
    name: str, attention: str, softcap: float, rotary: int
) -> None:
    """OPT scales its queries and flattens its stream; learned positions are counted from the padding mask."""
    model = fleet.shared(name, attention=attention)
    _, sites = _sites(model, fleet.example(model, 2, (0, 2)))
    assert {kind: len(stack.blocks) for kind, stack in sites.stacks.items()} == {"decoder": 3}
    for block in sites.stacks["decoder"].blocks:
        assert block.attention.softcap == softcap and block.attention.mask is not None
        assert block.attention.scale == (1.0 if name == "opt" else 0.25)
        assert block.input.meta["val"].ndim == block.output.meta["val"].ndim == 3
    assert "attention_mask" in sites.padding.name
    assert len(sites.rotary["decoder"]) == rotary and sites.head is not None and len(sites.caches) == 3


def test_a_decode_step_reads_a_cache() -> None:
    model = fleet.shared("llama")
    inputs = fleet.example(model, 2)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    mask = F.pad(inputs["attention_mask"], (0, 1), value=1)
    _, sites = _sites(
        model, {"input_ids": inputs["input_ids"][:, -1:], "attention_mask": mask, "past_key_values": cache}
    )
    assert sites.phase == "decode"
    assert all(site.past is not None for site in sites.caches.values())


# Addresses.


@pytest.fixture(scope="module")
def llava() -> Sites:
    model = fleet.shared("llava")
    return _sites(model, fleet.example(model))[1]


def test_every_address_that_is_listed_resolves(llava: Sites) -> None:
    listed = addresses(llava)
    for address in listed:
        head, dots, rest = address.partition("..")
        for text in [address] if not dots else [f"{head[:-1]}{i}{rest[1:]}" for i in range(int(rest[0]) + 1)]:
            place = resolve_address(llava, text)
            assert place.node.meta["val"].ndim in (2, 3, 4), text
            assert (place.attention is not None) == text.endswith(".attention")
    assert {
        "vision.0..2.input",
        "decoder.0..2.attention",
        "projector.input",
        "projector.patches",
        "splice.output",
        "embedding.output",
        "head.input",
    } <= set(listed)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("decoder.-1.output", "decoder.2.output"),
        ("decoder.-3.input", "decoder.0.input"),
        ("decoder.input", "decoder.0.input"),
        ("vision.features.attention", "vision.1.attention"),
        ("decoder.1.output", "decoder.2.input"),
    ],
)
def test_addresses_with_two_spellings_are_one_place(llava: Sites, text: str, same: str) -> None:
    assert resolve_address(llava, text).node is resolve_address(llava, same).node


@pytest.mark.parametrize(
    ("text", "owner"),
    [
        ("vision.0.input", "vision"),
        ("projector.input", "vision"),
        ("projector.patches", "vision"),
        ("splice.input", "vision"),
        ("splice.output", "decoder"),
        ("decoder.1.attention", "decoder"),
    ],
)
def test_a_place_knows_whose_sequence_it_holds(llava: Sites, text: str, owner: str) -> None:
    assert resolve_address(llava, text).owner == owner


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("decoder.3.input", "decoder has 3 blocks, 0 to 2"),
        ("decoder.-4.input", "decoder has 3 blocks, 0 to 2"),
        ("encoder.0.input", "this graph has no encoder stack"),
    ],
)
def test_an_address_that_matches_nothing_lists_what_there_is(llava: Sites, text: str, cause: str) -> None:
    with pytest.raises(AddressError, match=f"address '{text}' matches nothing") as caught:
        resolve_address(llava, text)
    assert cause in caught.value.cause and caught.value.remedy
    for listed in addresses(llava):
        assert listed in caught.value.found


def test_an_address_of_what_a_graph_does_not_have() -> None:
    model = fleet.shared("vit")
    _, sites = _sites(model, fleet.example(model))
    for text in ("projector.input", "splice.output", "decoder.0.input"):
        with pytest.raises(AddressError) as caught:
            resolve_address(sites, text)
        assert "vision.0..2.input" in caught.value.found and "one piece of a model" in caught.value.remedy


# Attention by hand.

B, H, T, D = 2, 2, 6, 3


def _project(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = x.view(x.shape[0], x.shape[1], H, D).transpose(1, 2)
    return heads * 2, heads + 1, heads - 1


def _join(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)


def _capped(x: Tensor, mask: Tensor) -> Tensor:
    """A block whose scores are scaled, capped and masked by hand, in Gemma's order."""
    query, key, value = _project(x)
    scores = torch.matmul(query, key.transpose(2, 3)) * 0.5
    scores = torch.tanh(scores / 30.0) * 30.0
    weights = F.softmax(scores + mask, dim=-1, dtype=torch.float32).to(query.dtype)
    return x + _join(torch.matmul(F.dropout(weights, 0.0, False), value))


X, MASK = torch.rand(B, T, H * D), torch.zeros(B, 1, T, T)


def test_soft_capped_attention_is_matched_with_its_scale_cap_and_mask() -> None:
    program = traced(_capped, X, MASK)
    sites = find_sites(program)
    (site,) = sites.attentions
    mask = list(program.graph.nodes)[1]
    assert site.mask is mask and site.softcap == 30.0 and site.scale == pytest.approx(0.5)
    assert tuple(site.key.meta["val"].shape) == (B, H, T, D) and not site.key_transposed
    assert site.value.meta["val"].shape == (B, H, T, D)
    (stack,) = sites.stacks.values()
    assert stack.blocks[0].input is next(iter(program.graph.nodes)) and stack.blocks[0].output in results(program)


@pytest.mark.parametrize(
    ("scores", "scale", "has_mask"),
    [
        (lambda q, k, m: q @ k.mT, 1.0, False),
        (lambda q, k, m: q @ k.mT / 4.0, 0.25, False),
        (lambda q, k, m: q @ k.mT * 0.5 + m, 0.5, True),
        (lambda q, k, m: q @ k.mT + m, 1.0, True),
        (lambda q, k, m: torch.matmul(q, k.transpose(-1, -2)) * 0.5 + m, 0.5, True),
    ],
    ids=["bare", "divided", "scaled-masked", "masked", "negative-transpose"],
)
def test_written_out_attention_is_matched_with_its_scale(scores: Any, scale: float, has_mask: bool) -> None:
    def block(x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = _project(x)
        return x + _join(scores(query, key, mask).softmax(-1) @ value)

    program = traced(block, X, MASK)
    sites = find_sites(program)
    (site,) = sites.attentions
    assert site.scale == pytest.approx(scale) and (site.mask is not None) == has_mask and len(sites.stacks) == 1
    # The key is the one that is written down in rows, or is known to lie in columns.
    assert site.key.meta["val"].shape[-1 if site.key_transposed else -2] == T


def _in_windows(scores: Tensor, bias: Tensor, windows: Tensor) -> Tensor:
    """Masks of two kinds: one for all, and one for each window; rows of the batch are windows."""
    shape = scores.shape
    scores = (scores + bias).view(1, shape[0], *shape[1:]) + windows[None, :, None]
    return scores.view(shape)


COUNT = """
rule: count
about: Count attention.
steps:
  - score: {name: much, by: attention_received, at: STACK.0.attention, queries: all}
  - select: {name: kept, by: topk, scores: much, among: all, keep: 3}
  - drop: {at: STACK.1.input, keep: kept, positions: keep}
"""


def test_attention_under_several_masks_is_matched_and_its_weights_are_not_counted(tmp_path: Path) -> None:
    def blocks(x: Tensor, mask: Tensor) -> Tensor:
        for _ in range(2):
            query, key, value = _project(x)
            x = x + _join(_in_windows(query @ key.mT * 0.5, mask[:1], mask[:, 0]).softmax(-1) @ value)
        return x

    program = traced(blocks, X, MASK)
    sites = find_sites(program)
    assert [len(stack.blocks) for stack in sites.stacks.values()] == [2]
    assert all(site.partial and site.scale == pytest.approx(0.5) for site in sites.attentions)
    (name,) = sites.stacks
    rule = tmp_path / "count.yaml"
    rule.write_text(COUNT.replace("STACK", name))
    with pytest.raises(EditError, match="several masks"):
        apply_rules(program, parse_rules({"rule": str(rule)}))


NOT_ATTENTION = {
    "weights that are no product": lambda x, m: x + m[:, 0].softmax(-1) @ x,
    "a softmax of its own": lambda x, m: x + (x.sum(-1, keepdim=True) * x).softmax(-1),
    "a weighted mean of tokens": lambda x, m: x + x.sum(-1)[:, None].softmax(-1) @ x,
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_a_softmax_that_is_not_attention_is_no_site(name: str) -> None:
    sites = find_sites(traced(NOT_ATTENTION[name], X, MASK))
    assert sites.attentions == [] and sites.stacks == {}


def test_scores_that_are_used_elsewhere_too_are_still_attention() -> None:
    """A model that hands its weights out (output_attentions) attends as ever: nothing is taken from the site."""

    def block(x: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = _project(x)
        weights = (query @ key.mT * 0.5).softmax(-1)
        return x + _join(weights @ value), weights

    sites = find_sites(traced(block, X))
    assert len(sites.attentions) == 1 and len(sites.stacks) == 1


def test_attention_without_a_residual_stays_loose() -> None:
    def pool(x: Tensor) -> Tensor:
        return _join(F.scaled_dot_product_attention(*_project(x)))

    sites = find_sites(traced(pool, X))
    assert len(sites.loose) == 1 and sites.stacks == {}
    with pytest.raises(AddressError) as caught:
        resolve_address(sites, "decoder.0.input")
    assert "stand on no residual stream" in caught.value.remedy


def test_causal_flags_tell_a_decoder_from_an_encoder() -> None:
    def block(causal: bool) -> Any:
        return lambda x: x + _join(F.scaled_dot_product_attention(*_project(x), is_causal=causal))

    assert list(find_sites(traced(block(True), X)).stacks) == ["decoder"]
    assert list(find_sites(traced(block(False), X)).stacks) == ["encoder"]


def test_two_residual_streams_are_two_stacks() -> None:
    def model(x: Tensor, y: Tensor) -> Tensor:
        def block(z: Tensor) -> Tensor:
            return z + _join(F.scaled_dot_product_attention(*_project(z)))

        return block(block(x)).mean(1) * block(y).mean(1)

    sites = find_sites(traced(model, X, X.clone()))
    assert {name: len(stack.blocks) for name, stack in sites.stacks.items()} == {"encoder": 2, "encoder2": 1}


def test_a_scale_given_to_the_fused_call_is_its_scale() -> None:
    program = traced(lambda x: x + _join(F.scaled_dot_product_attention(*_project(x), scale=0.3)), X)
    assert find_sites(program).attentions[0].scale == pytest.approx(0.3)
    assert len(calls(program, aten.scaled_dot_product_attention.default)) == 1


def test_kinds_of_tokens_are_no_padding() -> None:
    """Where several inputs reach the mask, padding is the one whose zeros hide keys."""
    family = catalogue.family("paligemma")
    model = family.build()
    program, sites = _sites(model, family.example(model))
    assert sites.padding is not None and "attention_mask" in sites.padding.name
    assert {n.name for n in program.inputs()} > {sites.padding.name}


def test_blocks_with_tables_of_their_own_have_them_all() -> None:
    family = catalogue.family("gemma3_text")
    model = family.build()
    _, sites = _sites(model, family.example(model))
    assert len(sites.rotary["decoder"]) == 2
