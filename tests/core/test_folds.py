"""Patches that become features in groups: several images, several drops, text, steps and targets that follow."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import towers
from core.test_family_generate import by_hand
from core.test_family_rules import options
from core.test_image_sizes import image_after_video, subject
from graphs import traced
from harness import Recording, difference, greedy, prune, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

import tokcompile
from tokcompile.axes import Atom
from tokcompile.capturing import imagesizes
from tokcompile.editing.edit import Editor
from tokcompile.models import catalogue
from tokcompile.passes.fold import of_patches, scores_of_features
from tokcompile.pipeline import apply_rules
from tokcompile.recording import replay
from tokcompile.rulefile import parse_rules
from tokcompile.sites.features import Fold

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = {"among": "image", "per": "image"}


def some(usual: str, *others: str) -> pytest.MarkDecorator:
    """Families of which `make test` runs the first alone."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in others]
    return pytest.mark.parametrize("name", [usual, *slow])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.data())
def test_scores_and_choices_go_to_features_and_back(sizes: list[int], data: st.DataObject) -> None:
    """Against a list of each feature's patches, for any factors of which the features have the first and some more."""
    more = data.draw(st.lists(st.booleans(), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    kept = [True, *more]
    patches = tuple(Atom(size) for size in sizes)
    fold = Fold(patches, tuple(atom for atom, yes in zip(patches, kept, strict=True) if yes))
    ranges = list(itertools.product(*map(range, sizes)))  # in the order of the patches
    names = [tuple(place for place, yes in zip(each, kept, strict=True) if yes) for each in ranges]
    members = [[i for i, name in enumerate(names) if name == one] for one in sorted(set(names))]
    scores, chosen = torch.rand(2, len(ranges)), torch.rand(2, len(members)) > 0.5
    program = traced(lambda x, m: (x.clone(), m.clone()), scores, chosen)
    editor = Editor(program, "test", Counter())
    with editor.before(program.output):
        inputs = list(program.graph.nodes)[:2]
        made = scores_of_features(editor, inputs[0], fold), of_patches(editor, inputs[1], fold)
    program.output.args = (made,)
    program.gm.recompile()
    means, spread = program.gm(scores, chosen)
    assert fold.members == len(members[0])
    torch.testing.assert_close(means, torch.stack([scores[:, each].mean(1) for each in members], 1))
    assert all(torch.equal(spread[:, i], chosen[:, f]) for f, each in enumerate(members) for i in each)


def tower(folder: Path, block: int = 1) -> str:
    """A rule that drops random patches before a block of the tower."""
    path = Path(families.rule(folder, "group", "vision"))
    path = path.rename(path.with_name(f"tower{block}.yaml"))
    path.write_text(path.read_text().replace("rule: group", f"rule: tower{block}"))
    return str(path)


def packed(folder: Path, at: str, per: str, keep: int) -> dict[str, Any]:
    return {"rule": families.rule(folder, "features", at), "keep": keep, "per": per}


@some("internvl", "smolvlm", "qwen2_5_vl")
def test_two_drops_in_a_tower_and_one_in_the_text(name: str, tmp_path: Path) -> None:
    """The second chooses among the features that the first left, the third among their tokens."""
    it = families.subject(catalogue.family(name))
    torch._dynamo.reset()
    # After a drop in a tower of windows, nobody knows any more how many images a packed row holds.
    budget = IMAGES | ({"per": "row"} if name == "qwen2_5_vl" else {})
    rules = [
        {"rule": tower(tmp_path, 0), "keep": 11, "block": 0, **budget},
        {"rule": tower(tmp_path, 1), "keep": 6, "block": 1, **budget},
        {"rule": families.rule(tmp_path, "group", "decoder"), "keep": 4, "block": 2, "among": "image"},
    ]
    got = prune(it.model, rules=rules)
    out = families.outputs(got(**it.inputs))
    first, second, words, fewer, last = got.kept
    both = [[row[i] for i in chosen] for row, chosen in zip(first, second, strict=True)]
    assert {len(row) for row in first} == {11} and {len(row) for row in both} == {6}
    stay = [[row[i] for i in chosen] for row, chosen in zip(words, fewer, strict=True)]
    with towers.shortened(it, first, block=0), towers.shortened(it, both, block=1, before=first):
        expected = families.hand_run(it, "decoder", stay, block=0, then=(2, last))
    assert families.compared(out, expected) == 0


@some("qwen2_vl", "mistral3", "internvl")
def test_a_batch_of_one(name: str, tmp_path: Path) -> None:
    family = catalogue.family(name)
    model = family.build()
    inputs = tokcompile.precompute(model, family.example(model, batch=1, padded=False) | {"use_cache": False})
    with imagesizes.packed(model):
        torch._dynamo.reset()
        pruned = prune(model, rule=tower(tmp_path), keep=7, **IMAGES)
        got = pruned(**inputs).logits
        it = families.Subject(family, model, inputs)
        with towers.shortened(it, pruned.kept[0]):
            expected = families.hand_run(it, "decoder", pruned.kept[1], block=0)
    assert families.compared([got], expected) == 0


@some("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
def test_two_images_in_a_row_share_its_budget_or_are_refused(name: str, tmp_path: Path) -> None:
    it = subject(name, images=2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a budget per image needs the images' own axis") as caught:
        prune(it.model, **packed(tmp_path, "splice.input", "image", 9))(**it.inputs)
    assert refusal(caught.value).found == "2 images in each row"
    torch._dynamo.reset()
    pruned = prune(it.model, **packed(tmp_path, "splice.input", "row", 9))
    got = families.outputs(pruned(**it.inputs))
    assert [len(row) for row in pruned.kept[0]] == [9, 9]
    assert families.compared(got, families.hand_run(it, "decoder", pruned.kept[1], block=0)) == 0


def test_a_budget_per_row_of_images_with_scores_of_their_own_is_refused(tmp_path: Path) -> None:
    it = families.subject(catalogue.family("internvl"), images=2)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="a budget per row needs the images of a row in one sequence") as caught:
        prune(it.model, **packed(tmp_path, "projector.input", "row", 9))(**it.inputs)
    assert refusal(caught.value).found == "2 images in each row, with scores of their own"


def test_neighbours_of_two_images_in_a_row_fail_when_run(tmp_path: Path) -> None:
    """A grid is one image's: which features are neighbours across two is not guessed."""
    it = subject("qwen2_vl", images=2)
    rule = tmp_path / "near.yaml"
    rule.write_text(
        """
rule: near
about: Random features and their neighbours, and others up to the budget.
params:
  keep: {type: ratio_or_count, default: 9, about: features kept}
steps:
  - score: {name: luck, by: random, at: vision.1.input}
  - select: {name: anchors, by: topk, scores: luck, among: image, keep: 1, per: row}
  - select: {name: around, by: neighbours, of: anchors, offsets: cross, edges: grid}
  - select: {name: kept, by: fill, first: [anchors, around], scores: luck, among: image, keep: "${keep}", per: row}
  - drop: {at: splice.input, keep: kept, positions: keep}
"""
    )
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="neighbours need the features of one image in each batch row"):
        prune(it.model, rule=str(rule))(**it.inputs)
    torch._dynamo.reset()
    one = subject("qwen2_vl")
    pruned = prune(one.model, rule=str(rule))
    got = families.outputs(pruned(**one.inputs))
    assert families.compared(got, families.hand_run(one, "decoder", pruned.kept[1], block=0)) == 0


def test_rows_with_different_shares_fail_when_run(tmp_path: Path) -> None:
    """Packed features are rows of equal shares; where they are not, nothing is computed wrongly."""
    it = subject("qwen2_vl")
    torch._dynamo.reset()
    pruned = prune(it.model, **packed(tmp_path, "projector.input", "row", 7))
    pruned(**it.inputs)
    inputs = dict(it.inputs)
    ids = inputs["input_ids"].clone()
    image = it.model.config.image_token_id
    moved = (ids[0] == image).nonzero()[0]
    ids[0, moved] = 5
    ids[1, (ids[1] != image).nonzero()[-1]] = image
    with pytest.raises(RuntimeError, match="different numbers of image tokens"):
        pruned(**(inputs | {"input_ids": ids}))


def test_features_that_the_model_leaves_out_itself_fail_when_run(tmp_path: Path) -> None:
    """Which of the features that are offered are picked is known only then: all are counted."""
    it = families.subject(catalogue.family("molmo2"))
    torch._dynamo.reset()
    pruned = prune(it.model, **packed(tmp_path, "splice.input", "row", 7))
    pruned(**it.inputs)
    pooling = it.inputs["image_token_pooling"].clone()
    pooling[0] = -1
    with pytest.raises(RuntimeError, match="of which the model leaves out others itself"):
        pruned(**(it.inputs | {"image_token_pooling": pooling}))


@some("qwen2_vl", "qwen3_vl")
def test_features_of_images_beside_a_video(name: str, tmp_path: Path) -> None:
    """One program holds the tower twice; what is spliced in first are the images', and the video's stay whole."""
    it = subject(name, image_after_video(name))
    torch._dynamo.reset()
    pruned = prune(it.model, **packed(tmp_path, "splice.input", "row", 7))
    got = families.outputs(pruned(**it.inputs))
    images = it.inputs["mm_token_type_ids"] == 1
    assert all(sum(images[row, t].item() for t in kept) == 7 for row, kept in enumerate(pruned.kept[1]))
    assert families.compared(got, families.hand_run(it, "decoder", pruned.kept[1], block=0)) == 0


@some("qwen2_5_vl", "internvl", "mistral3")
def test_generate_after_features_were_dropped(name: str) -> None:
    it = families.subject(catalogue.family(name))
    given = options(name, "hiprune") | {"positions": "keep"}
    torch._dynamo.reset()
    pruned = prune(it.model, **given)
    pruned(**it.inputs)
    expected = by_hand(it, pruned.kept[-1], block=0)
    prompt = it.family.example(it.model, batch=2, padded=True)
    torch._dynamo.reset()
    tokcompile.compile(it.model, target="eager", **given)
    try:
        got = torch.stack(it.model.generate(**prompt, **greedy(4)).logits, 1)
    finally:
        tokcompile.restore(it.model)
    assert difference(got, expected) <= 1e-4


@pytest.mark.slow
@some("gemma3", "qwen2_5_vl")
def test_inductor_says_the_same(name: str, tmp_path: Path) -> None:
    it = families.subject(catalogue.family(name))
    outs = []
    for target in ("eager", "inductor"):
        torch._dynamo.reset()
        pruned = prune(it.model, target=target, rule=tower(tmp_path), keep=7, **IMAGES)
        outs.append((pruned(**it.inputs).logits, pruned.kept))
    assert outs[0][1] == outs[1][1] and difference(outs[0][0], outs[1][0]) <= 1e-4


@some("qwen2_5_vl", "internvl")
def test_a_recorded_choice_needs_no_scores(name: str) -> None:
    it = families.subject(catalogue.family(name))
    given = options(name, "hiprune")
    torch._dynamo.reset()
    pruned = prune(it.model, **given)
    out = pruned(**it.inputs).logits
    held = Recording()
    held.maps.update(pruned.recording.maps)
    torch._dynamo.reset()
    again = prune(it.model, replay=held, **given)
    assert difference(again(**it.inputs).logits, out) == 0
    program = it.program.copy()
    apply_rules(program, parse_rules(given))
    replay(program, held)
    left = {str(node.target) for node in program.graph.nodes}
    assert not any("attention_received" in target or "topk" in target for target in left)
