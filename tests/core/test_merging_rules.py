"""The rules that merge image tokens, beside what the matrix of invariants asks of every rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fleet
import merging_naive
import naive
import pytest
import torch
from clustering_naive import decode
from core.test_export import exported
from harness import cases, difference, greedy, prune, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile.models import catalogue, families
from tokcompile.rulefile import LIBRARY

STEPS = 4
PADS = {1: (), 3: (2, 0, 1)}
RULES: dict[str, tuple[dict[str, Any], merging_naive.Merge]] = {
    "tokenflex": ({"n": 3}, merging_naive.pooled(3)),
    "visionzip": ({"dominant": 5, "contextual": 3}, merging_naive.zipped(5, 3)),
    "vqtoken": ({"codes": 4}, merging_naive.coded(4, 10)),
}
each_rule = pytest.mark.parametrize("rule", RULES)


def _compared(got: Any, kept: Any, ran: naive.Ran, tolerance: float = 1e-5) -> None:
    assert kept == ran.kept
    assert difference(got.logits, ran.logits) <= tolerance


@each_rule
@pytest.mark.parametrize("batch", PADS, ids=["one-row", "left-padded"])
def test_generate_equals_a_run_by_hand(rule: str, batch: int) -> None:
    options, merge = RULES[rule]
    model = fleet.build("llava")
    inputs = fleet.example(model, batch, PADS[batch])
    expected = merging_naive.generate(model, inputs, STEPS, merge)
    tokcompile.compile(model, rule=rule, target="eager", **options)
    out = model.generate(**inputs, **greedy(STEPS))
    assert difference(torch.stack(out.logits, 1), expected) <= 1e-4
    lengths = merging_naive.run(model, inputs, merge).lengths
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [n + STEPS - 1 for n in lengths]


@each_rule
def test_a_drop_in_the_decoder_follows_a_merge(rule: str) -> None:
    options, merge = RULES[rule]
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS[3])
    pruned = prune(model, rules=[{"rule": rule, **options}, {"rule": "fastv", "layer": 2, "keep": 2}])
    ran = merging_naive.run(model, inputs, merge, [naive.fastv(2, 2)])
    _compared(pruned(**inputs), pruned.kept, ran)


def _two_images(model: nn.Module, batch: int) -> dict[str, Tensor]:
    """Two images in each row, one after the other."""
    inputs = fleet.example(model, 2 * batch)
    ids = torch.cat([inputs["input_ids"][:batch], inputs["input_ids"][batch:]], 1)
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
@each_rule
def test_two_images_in_a_row(rule: str, batch: int) -> None:
    """Merged one by one before the projector; clustered together after it, as a video's frames are."""
    options, merge = RULES[rule]
    if rule == "vqtoken":
        merge = merging_naive.coded(4, 10, images=2)
    model = fleet.shared("llava")
    inputs = _two_images(model, batch)
    pruned = prune(model, rule=rule, **options)
    _compared(pruned(**inputs), pruned.kept, merging_naive.run(model, inputs, merge))


@torch.no_grad()
def test_two_images_keep_the_positions_that_new_tokens_stand_for() -> None:
    """Each image's new tokens stand at places of its own, in an order that is not that of the places."""
    options, merge = RULES["visionzip"]
    model = fleet.shared("llava")
    inputs = _two_images(model, 2)
    features, source = merge.mix(model, inputs["pixel_values"])
    assert any(row != sorted(row) for row in source)
    embed, rows, places = model.get_input_embeddings(), [], []
    new = iter(zip(model.model.multi_modal_projector(features), source, strict=True))
    for ids in inputs["input_ids"]:
        image = [i for i, token in enumerate(ids.tolist()) if token == fleet.IMAGE]
        starts = [i for i in image if i - 1 not in image]
        row, place, end = [], [], 0
        for start in starts:
            made, stand = next(new)
            row += [embed(ids[end:start]), made]
            place += [*range(end, start), *(start + i for i in stand)]
            end = start + len(image) // len(starts)
        rows.append(torch.cat([*row, embed(ids[end:])]))
        places.append([*place, *range(end, len(ids))])
    hidden = torch.stack(rows)
    expected = decode(model, hidden, torch.ones(hidden.shape[:2], dtype=torch.bool), torch.tensor(places))
    out = prune(model, rule="visionzip", positions="keep", **options)(**inputs)
    assert difference(out.logits, expected) <= 1e-5


# Pooling.


@torch.no_grad()
@pytest.mark.parametrize("positions", ["keep", "compact"])
def test_tiles_that_the_model_picks_by_their_values_are_pooled(positions: str) -> None:
    """How many tiles are left is known only when the model runs: each is pooled, and the text is made to fit."""
    family = catalogue.family("smolvlm")
    model = family.build()
    inputs = family.example(model, batch=2, padded=True) | {"use_cache": False}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    image = ids == model.config.image_token_id
    first = [row * 5 + column for row in (0, 2) for column in (0, 2)]  # bins overlap: 0-2 and 2-4 of 5
    stay = [
        [i for i, is_image in enumerate(row.tolist()) if not is_image or (int(row[:i].sum()) % 25) in first]
        for row in image
    ]

    def pool(module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        (x,) = args
        grid = x.unflatten(1, (5, 5)).movedim(-1, 1)
        return nn.functional.adaptive_avg_pool2d(grid, 2).flatten(2).transpose(1, 2)

    short = {name: torch.stack([v[b, s] for b, s in enumerate(stay)]) for name, v in (("ids", ids), ("mask", mask))}
    places = torch.tensor(stay) if positions == "keep" else torch.arange(len(stay[0])).expand(2, -1)
    hook = model.model.connector.modality_projection.register_forward_pre_hook(pool)
    by_hand = {"input_ids": short["ids"], "attention_mask": short["mask"], "position_ids": places}
    expected = model(**(inputs | by_hand)).logits
    hook.remove()
    pruned = prune(model, rule="tokenflex", n=2, positions=positions)
    got = pruned(**inputs).logits
    assert pruned.kept == [[first] * 4, stay]
    assert difference(got, expected) <= 1e-5


def test_one_set_of_weights_serves_several_numbers_of_tokens() -> None:
    """A graph for each size, none more for another call, and the same state."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (1, 0))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    served = {n: prune(model, rule="tokenflex", n=n) for n in (1, 2, 3)}
    first = {n: pruned(**inputs).logits for n, pruned in served.items()}
    for n, pruned in served.items():
        assert torch.equal(pruned(**inputs).logits, first[n])
        assert len(pruned.report.graphs) == 1
        _compared(pruned(**inputs), pruned.kept, merging_naive.run(model, inputs, merging_naive.pooled(n)), 0)
    torch._dynamo.reset()
    alone = prune(model, rule="tokenflex", n=2)
    assert torch.equal(alone(**inputs).logits, first[2])
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


BY_SIDES = """
rule: sides
about: Pool to a grid that is no square.
params:
  rows: {type: int, default: 2, about: rows left}
  columns: {type: int, default: 3, about: columns left}
steps:
  - merge: {by: pool, at: projector.input, rows: "${rows}", columns: "${columns}", positions: compact}
"""


@pytest.mark.parametrize("sides", [(2, 3), (3, 1), (4, 2), (9, 3)])
def test_a_grid_that_is_no_square(sides: tuple[int, int], tmp_path: Path) -> None:
    """More rows than there are leave the rows as they are."""
    path = tmp_path / "sides.yaml"
    path.write_text(BY_SIDES)
    model = fleet.shared("llava-siglip-qwen2")
    inputs = fleet.example(model, 2, (1, 0))
    pruned = prune(model, rule=str(path), rows=sides[0], columns=sides[1])
    ran = merging_naive.run(model, inputs, merging_naive.pooled(min(sides[0], 4), sides[1]))
    _compared(pruned(**inputs), pruned.kept, ran)


def test_training_goes_through_the_pool() -> None:
    """A step with another n each time trains a projector for all of them: its gradients are those by hand."""
    model = fleet.build("llava")
    inputs = fleet.example(model, 2, (1, 0))
    projector = model.model.multi_modal_projector.linear_1.weight
    tower = model.model.vision_tower.embeddings.patch_embedding.weight
    pruned = prune(model, rule="tokenflex", n=3)
    pruned.call(**inputs, use_cache=False).logits.square().sum().backward()
    got = [p.grad.clone() for p in (projector, tower)]
    model.zero_grad()
    merging_naive.run.__wrapped__(model, inputs, merging_naive.pooled(3)).logits.square().sum().backward()
    for one, other in zip(got, (projector.grad, tower.grad), strict=True):
        assert other.abs().max() > 0
        assert difference(one, other) <= 1e-4 * other.abs().max().item()


# Dominant and contextual tokens.


def test_the_paper_s_sizes_leave_64_of_576_tokens() -> None:
    """54 dominant tokens, the class token among them, and 10 contextual ones."""
    vision = fleet.VISION | {"image_size": 336, "patch_size": 14}
    model = families.llava(vision, fleet.TEXT | {"max_position_embeddings": 1024}, image_token_index=fleet.IMAGE)
    model.config.image_seq_length = 576
    model.eval()
    inputs = fleet.example(model, 2, (2, 0))
    pruned = prune(model, rule="visionzip")
    ran = merging_naive.run(model, inputs, merging_naive.zipped(54, 10))
    out = pruned(**inputs)
    _compared(out, pruned.kept, ran)
    assert out.logits.shape[1] == 64 + 8
    for source in ran.kept[0]:
        left = sorted(set(range(576)) - set(source[1:54]))
        assert source[54:] == left[:469:52] and len(left) == 523


@pytest.mark.parametrize(
    "case", cases(4, name=("llava", "llava-siglip-qwen2"), contextual=(1, 4, 11), content=("sum", "average"))
)
def test_contextual_tokens(case: dict[str, Any]) -> None:
    """One target takes all that is left; eleven leave one or two that are merged."""
    name, contextual, content = case.values()
    model = fleet.shared(name)
    inputs = fleet.example(model, 2, (1, 0))
    queries = "cls" if naive.class_tokens(model) else "all"
    pruned = prune(model, rule="visionzip", dominant=4, contextual=contextual, content=content, queries=queries)
    ran = merging_naive.run(model, inputs, merging_naive.zipped(4, contextual, content))
    _compared(pruned(**inputs), pruned.kept, ran)


def _refused(model: nn.Module, match: str, **options: Any) -> tokcompile.TokredError:
    with pytest.raises(Exception, match=match) as caught:
        prune(model, **options)(**fleet.example(model))
    return refusal(caught.value)


def test_a_class_token_that_is_not_there_looks_at_nothing() -> None:
    error = _refused(fleet.shared("llava-siglip-qwen2"), "no class token", rule="visionzip", dominant=4, contextual=2)
    assert "queries: all" in error.remedy


def test_a_class_token_among_the_features_is_not_merged_with_them(tmp_path: Path) -> None:
    """The rule itself is refused before that: where features have no grid, a budget of one image means nothing."""
    options = {"dominant": 4, "contextual": 2}
    _refused(fleet.shared("llava-last"), "a budget per image needs", rule="visionzip", **options)
    path = tmp_path / "rows.yaml"
    path.write_text((LIBRARY / "visionzip.yaml").read_text().replace("per: image", "per: row"))
    torch._dynamo.reset()
    error = _refused(fleet.shared("llava-last"), "class tokens are among the features", rule=str(path), **options)
    assert error.where


def test_tokens_that_an_earlier_rule_dropped_are_not_chosen_again() -> None:
    rules = [{"rule": "hiprune", "keep": 9}, {"rule": "visionzip", "dominant": 4, "contextual": 2}]
    _refused(fleet.shared("llava"), "chosen among others than those that are merged", rules=rules)


# Clusters.


@pytest.mark.parametrize(
    "options",
    [{"normalise": False}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"seed": 5}, {"iterations": 1}))],
)
def test_options_of_clusters(options: dict[str, Any]) -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 3, PADS[3])
    pruned = prune(model, rule="vqtoken", codes=5, **options)
    ran = merging_naive.run(model, inputs, merging_naive.coded(5, **{"iterations": 10, **options}))
    _compared(pruned(**inputs), pruned.kept, ran)


def test_a_seed_says_the_same_twice_and_another_says_something_else() -> None:
    model = fleet.shared("llava")
    inputs = fleet.example(model, 2)
    out = []
    for seed in (0, 0, 1):
        torch._dynamo.reset()
        out.append(prune(model, rule="vqtoken", codes=5, seed=seed)(**inputs).logits)
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])


# What is refused.


def test_pooling_without_a_grid_is_refused() -> None:
    assert (
        "projector.input" in _refused(fleet.shared("llava-last"), "needs the patch grid", rule="tokenflex", n=2).remedy
    )


IN_THE_TEXT = """
rule: late
about: Merge where image tokens stand among those of the text.
steps:
  - merge: {by: kmeans, at: decoder.1.input, count: 4}
"""


def test_tokens_of_images_are_not_merged_with_those_of_a_text(tmp_path: Path) -> None:
    path = tmp_path / "late.yaml"
    path.write_text(IN_THE_TEXT)
    error = _refused(fleet.shared("llava"), "among those of a text", rule=str(path))
    assert "projector.input" in error.remedy


@each_rule
def test_images_of_any_size_are_refused(rule: str) -> None:
    """SigLIP takes images of any size, and then nobody knows how many tokens there are to merge."""
    model = fleet.shared("llava-siglip-qwen2")
    options = RULES[rule][0] | ({"queries": "all"} if rule == "visionzip" else {})
    pruned = prune(model, dynamic=True, rule=rule, **options)
    with pytest.raises(Exception, match="number of image tokens is not known|needs the patch grid") as caught:
        pruned(**fleet.example(model, 2))
    assert refusal(caught.value).remedy


# Exported programs.


@each_rule
def test_a_rewritten_program_equals_the_run_by_hand_and_decomposes(rule: str) -> None:
    options, merge = RULES[rule]
    model, inputs, program = exported()
    rewritten = tokcompile.rewrite(program, rule, **options)
    expected = merging_naive.run(model, inputs, merge).logits
    assert difference(rewritten.module()(**inputs), expected) <= 1e-5
    lowered = rewritten.run_decompositions()
    assert not any("tokred" in str(n.target) for n in lowered.graph.nodes)
    assert difference(lowered.module()(**inputs), expected) <= 1e-5
