"""Pairs merged in vision towers: the method's own form run by hand, on models of timm and of transformers."""

from __future__ import annotations

from typing import Any

import fleet
import pytest
import torch
import torch._dynamo
import unloaded
from harness import difference, prune, refusal
from rulecases import tome
from torch import Tensor, nn

import tokcompile
from tokcompile.models.catalogue import family
from tokcompile.passes.pairs import schedule

TIMM = {
    "timm_vit": 1,
    "timm_vit_written": 1,
    "timm_vit_scaled": 1,
    "timm_vit_mean": 0,
    "timm_vit_registers": 5,
    "timm_deit": 2,
}
"""Families, and how many tokens stand in front of their patches."""
library = unloaded.declare_operators()


def _built(name: str) -> nn.Module:
    known = family(name)
    if reason := unloaded.missing(known.needs):
        pytest.skip(reason)
    return known.build()


def _attention(attention: nn.Module, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What an attention of timm gives, and its keys."""
    q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    out = nn.functional.scaled_dot_product_attention(q, k, v, bias)
    return attention.proj(out.transpose(1, 2).flatten(2)), k


@torch.no_grad()
def merged_by_hand(model: nn.Module, images: Tensor, counts: list[int], leading: int, weigh: bool = True) -> Any:
    """A ViT of timm with pairs merged between attention and feed-forward of each block.

    Returns:
        What the model says, the tokens before its head, and for each block the tokens that stay, those merged, and into
        what.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    sizes, stays = torch.ones(x.shape[:2]), []
    for block, count in zip(model.blocks, counts, strict=True):
        bias = sizes.log()[:, None, None] if weigh and stays else None
        attended, keys = _attention(block.attn, block.norm1(x), bias)
        x = x + block.ls1(attended)
        if count:
            chosen = [tome.pairs(row, count, leading) for row in keys.mean(1)]
            rows = [tome.merge(x[i], sizes[i], *each) for i, each in enumerate(chosen)]
            x, sizes = (torch.stack(each) for each in zip(*rows, strict=True))
            stays.append([tome.packed(*each) for each in chosen])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = model.norm(x)
    return model.forward_head(x), x, stays


@pytest.mark.parametrize("weigh", [True, False], ids=["weighed", "alike"])
@pytest.mark.parametrize("name", TIMM)
def test_a_vit_of_timm_merges_what_the_method_merges(name: str, weigh: bool) -> None:
    model = _built(name)
    inputs = family(name).example(model, batch=2)
    (images,) = inputs.values()
    tokens = model.pos_embed.shape[1] + (0 if "registers" not in name else 5)
    counts = tome.counts("1/3", len(model.blocks), tokens, TIMM[name])
    pruned = prune(model, rule="tome", pairs=3, proportional=weigh)
    said, _, stays = merged_by_hand(model, images, counts, TIMM[name], weigh)
    assert difference(pruned(**inputs), said) <= 1e-5
    assert pruned.kept == stays
    assert [len(each[0]) for each in stays] == [tokens - 3 * i + 3 for i in range(len(stays))]


@pytest.mark.parametrize("name", ["timm_beit", "timm_eva02", "timm_dinov3", "timm_siglip", "timm_eva"])
def test_positions_of_a_tower_follow_the_tokens_that_stay(name: str) -> None:
    """Relative bias and rotary tables are those of the token that others were merged into: a replay says the same."""
    model = _built(name)
    inputs = family(name).example(model, batch=2)
    with torch.no_grad():
        assert difference(prune(model, rule="tome", pairs=0)(**inputs), model(*inputs.values())) == 0
    torch._dynamo.reset()
    pruned = prune(model, rule="tome", pairs=2)
    said = pruned(**inputs)
    rows = [prune(model, dynamic=False, rule="tome", pairs=2)(**fleet.row(inputs, i)) for i in range(2)]
    assert difference(said, torch.cat(rows)) <= 1e-5
    torch._dynamo.reset()
    replayed = prune(model, replay=pruned.recording, rule="tome", pairs=2)
    assert difference(replayed(**inputs), said) <= 1e-6


def _by_hand(name: str, inputs: dict[str, Tensor], count: int) -> tuple[tome.Tower, list[Tensor]]:
    model = fleet.shared(name)
    core = model.vit if name == "vit" else model
    layers = list(core.layers if hasattr(core, "layers") else core.encoder.layers)
    start = model(**inputs, output_hidden_states=True).hidden_states[0]
    tower = tome.Tower(layers, [count] * len(layers), leading=1)
    return tower, tower.run(start)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", fleet.TOWERS)
def test_a_tower_of_transformers_equals_the_run_by_hand(name: str, attention: str) -> None:
    model = fleet.shared(name, attention=attention)
    inputs = fleet.example(model, 3)
    tower, states = _by_hand(name, inputs, 2)
    pruned = prune(model, rule="tome", pairs=2)
    out = pruned(**inputs, output_hidden_states=True)
    assert pruned.kept == tower.packed
    assert all(difference(got, one) <= 1e-5 for got, one in zip(out.hidden_states, states, strict=True))


@pytest.mark.parametrize("target", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_restored_outputs_hold_each_patch_s_merged_token(target: str) -> None:
    model = fleet.shared("clip")
    inputs = fleet.example(model, 3)
    tower, states = _by_hand("clip", inputs, 2)
    out = prune(model, target, rule="tome", pairs=2, restore=True)(**inputs)
    assert out.last_hidden_state.shape == (3, 17, 32)
    for row in range(3):
        holder = list(range(17))
        for stays, merged in zip(tower.stays, tower.merged, strict=True):
            new = {token: place for place, token in enumerate(stays[row])}
            new |= {i: new[into] for i, into in merged[row]}
            holder = [new[token] for token in holder]
        assert difference(out.last_hidden_state[row], states[-1][row, holder]) <= 1e-5


def test_restore_needs_an_output_that_holds_the_tokens() -> None:
    model = fleet.shared("llava")
    with pytest.raises(Exception, match="no output of the model holds the merged tokens") as caught:
        prune(model, rule="tome", pairs=2, restore=True)(**fleet.example(model, 2))
    assert "tome.yaml" in str(refusal(caught.value))


def test_a_dynamic_batch_is_one_graph() -> None:
    model = fleet.shared("clip")
    pruned = prune(model, dynamic=True, rule="tome", pairs=2)
    for batch in (2, 3, 5):
        inputs = fleet.example(model, batch)
        tower, states = _by_hand("clip", inputs, 2)
        torch.testing.assert_close(pruned(**inputs).last_hidden_state, states[-1], rtol=1e-4, atol=1e-5)
        assert pruned.kept == tower.packed
    assert len(pruned.report.graphs) == 1


def test_an_exported_tower_merges_the_same() -> None:
    model = fleet.shared("clip")
    inputs = fleet.example(model, 2)
    exported = torch.export.export(model, (), inputs, strict=False)
    smaller = tokcompile.rewrite(exported, "tome", pairs=2)
    _, states = _by_hand("clip", inputs, 2)
    torch.testing.assert_close(smaller.module()(**inputs).last_hidden_state, states[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["eager", "aot_eager"])
def test_training_through_a_merge_has_the_gradients_of_the_run_by_hand(target: str) -> None:
    model = fleet.build("clip")
    inputs = fleet.example(model, 2)
    pruned = prune(model, target, rule="tome", pairs=2)
    got = _gradients(model, lambda: pruned.call(**inputs).last_hidden_state)
    tower = tome.Tower(list(model.encoder.layers), [2] * 3, leading=1)
    start = model.pre_layrnorm(model.embeddings(inputs["pixel_values"]))
    expected = _gradients(model, lambda: tower.run.__wrapped__(tower, start)[-1])
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


def _gradients(model: nn.Module, run: Any) -> dict[str, Tensor]:
    model.zero_grad()
    run().square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "post" not in n}


@pytest.mark.parametrize(
    ("count", "inflect", "blocks", "expected"),
    [
        (8, 0, 4, [8, 8, 8, 8]),
        (8, -1, 5, [16, 12, 8, 4, 0]),
        (8, 1, 5, [0, 4, 8, 12, 16]),
        (5, -0.5, 3, [7, 5, 3]),
        ((3, 1), 0, 4, [3, 1, 0, 0]),
        (3, 0, 1, [3]),
    ],
)
def test_a_schedule_is_spread_over_the_blocks(count: Any, inflect: float, blocks: int, expected: list[int]) -> None:
    assert schedule(count, inflect, blocks) == expected


def test_more_pairs_than_there_are_are_capped() -> None:
    """16 pairs leave 11 of 197 tokens after 12 blocks: the last has but 10 to merge."""
    tokens = 197
    for _ in range(12):
        tokens -= min(16, (tokens - 1) // 2)
    assert tokens == 11
    model = fleet.shared("clip")
    pruned = prune(model, rule="tome", pairs=99)
    assert pruned(**fleet.example(model, 1)).last_hidden_state.shape[1] == 3
    assert [len(each[0]) for each in pruned.kept] == [17 + 8, 9 + 4, 5 + 2]
