"""Merging between the frames of a video: the rule on a whole model against a run by hand, and what is refused."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import families
import fleet
import pytest
import torch
from harness import Pruned, difference, greedy, prune, refusal
from rulecases import aot_video
from torch import Tensor, nn

import tokcompile
from tokcompile.models.catalogue import Family, family
from tokcompile.rulefile import load_rule

FACTS = {"vision.depth": 26, "decoder.depth": 28, "image.tokens": 729, "grid.width": 27, "grid.height": 27}
STEPS = 4


def sized(side: int, frames: int = 5) -> Family:
    """LLaVA-OneVision with so many rows of patches, and videos of so many frames."""
    known = family("llava_onevision")
    vision = known.config["vision_config"] | {"image_size": 4 * side}
    videos = known.videos.model_copy(update={"options": known.videos.options | {"frames": frames}})
    return known.model_copy(update={"config": known.config | {"vision_config": vision}, "videos": videos})


@cache
def shared(side: int = 5) -> nn.Module:
    """A model that tests share; none may change it."""
    return sized(side).build()


def example(model: nn.Module, batch: int, padded: bool = True, videos: int = 1, frames: int = 5) -> dict[str, Tensor]:
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    return sized(side, frames).example(model, batch=batch, padded=padded, images=0, videos=videos)


def checked(pruned: Pruned, inputs: dict[str, Tensor], model: nn.Module, tolerance: float = 1e-5, **by_hand: Any):
    out = pruned(**inputs)
    ran = aot_video.run(model, inputs, **by_hand)
    assert pruned.kept == ran.kept
    assert difference(out.logits, ran.logits) <= tolerance
    if out.past_key_values is not None:
        assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == ran.lengths
    return out


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "odd grid": (5, {"anchors": 10, "windows": 1, "cells": 3}),
    "short clips": (5, {"anchors": 20, "windows": 1, "cells": 5, "ratio": 0.5, "clip": 2}),
    "windows": (6, {"anchors": 12, "windows": 3, "cells": 3, "ratio": 1.0, "clip": 5}),
    "one clip": (6, {"anchors": "1/3", "windows": 2, "cells": "1/2", "clip": 8}),
    "clips of one frame": (5, {"anchors": 10, "windows": 1, "cells": 3, "clip": 1}),
    "all patches are anchors": (5, {"anchors": 1.0, "windows": 1, "cells": 4}),
}
"""Rows of patches, and options of the rule."""
USUAL = {("windows", 2, 2)}


@pytest.mark.parametrize(
    ("name", "batch", "videos"),
    [
        pytest.param(*case, marks=() if case in USUAL else (pytest.mark.slow,))
        for case in itertools.product(CASES, (1, 2), (1, 2))
    ],
)
def test_the_rule_equals_the_run_by_hand(name: str, batch: int, videos: int) -> None:
    side, options = CASES[name]
    model = shared(side)
    inputs = example(model, batch, padded=batch > 1, videos=videos)
    exact = {"ratio": Fraction(str(options["ratio"]))} if "ratio" in options else {}
    checked(prune(model, rule="aot_video", **options), inputs, model, **(options | exact))


OPTIONS: dict[str, Any] = {"anchors": 10, "windows": 1, "cells": 3}


def test_kept_positions_are_those_of_the_places_of_features() -> None:
    """A merged first frame has those of its clip's last tokens, some of which stand before ones that stay."""
    model = shared()
    inputs = example(model, 2)
    options = OPTIONS | {"positions": "keep", "cells": 5, "ratio": 0.5}
    pruned = prune(model, rule="aot_video", **options)
    ran = aot_video.run(model, inputs, **(options | {"ratio": Fraction(1, 2)}))
    assert difference(pruned(**inputs).logits, ran.logits) <= 1e-5
    assert pruned.kept == ran.kept and any(row != sorted(row) for row in ran.kept[3])


@pytest.mark.slow
def test_one_graph_serves_texts_of_any_length() -> None:
    model = sized(5).build()
    model.set_attn_implementation("eager")
    pruned = prune(model, rule="aot_video", **OPTIONS)
    for length in (17, 29):
        inputs = sized(5).example(model, batch=2, padded=True, images=0, videos=1, length=length)
        for name in ("input_ids", "attention_mask"):
            torch._dynamo.mark_dynamic(inputs[name], 1)
        out = pruned(**inputs, use_cache=False)
        ran = aot_video.run(model, inputs, **OPTIONS)
        assert pruned.kept == ran.kept and difference(out.logits, ran.logits) <= 1e-5
    assert len(pruned.report.graphs) == 1


@pytest.mark.slow
def test_half_precision_equals_the_run_by_hand() -> None:
    model = sized(5).build(dtype=torch.bfloat16)
    checked(prune(model, rule="aot_video", **OPTIONS), example(model, 2), model, tolerance=0.05, **OPTIONS)


@pytest.mark.slow
def test_videos_of_any_size_are_refused() -> None:
    model = shared()
    pruned = prune(model, dynamic=True, rule="aot_video", **OPTIONS)
    with pytest.raises(Exception, match="number of image tokens is not known") as caught:
        pruned(**example(model, 2))
    assert "static image size" in refusal(caught.value).remedy


@pytest.mark.slow
def test_rows_do_not_see_each_other() -> None:
    model = shared()
    inputs = example(model, 2)
    together = prune(model, rule="aot_video", **OPTIONS)
    logits, maps = together(**inputs).logits, together.kept
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        torch._dynamo.reset()
        alone = prune(model, rule="aot_video", **OPTIONS)
        out = alone(**one)
        for batch, own in zip(maps, alone.kept, strict=True):
            assert batch[row * len(own) : (row + 1) * len(own)] == own
        assert difference(logits[row : row + 1], out.logits) <= 1e-5


def test_a_selection_of_all_cells_keeps_every_bit() -> None:
    model = shared()
    inputs = example(model, 2)
    pruned = prune(model, rule="aot_video", anchors=1.0, windows=1, cells=1.0)
    with torch.no_grad():
        assert difference(pruned(**inputs).logits, model(**inputs).logits) == 0
    notes = [record["note"] for record in pruned.report.graphs[0][0].steps if record["verb"] == "merge"]
    assert notes == ["everything is kept: no edit"] * 2


@pytest.mark.slow
def test_a_second_call_is_merged_by_its_own_scores() -> None:
    model = shared()
    pruned = prune(model, rule="aot_video", **OPTIONS)
    for seed in (0, 1):
        inputs = sized(5).example(model, batch=2, padded=True, images=0, videos=1, seed=seed)
        checked(pruned, inputs, model, **OPTIONS)
    assert len(pruned.report.graphs) == 1


@pytest.mark.slow
def test_a_replayed_recording_equals_the_run() -> None:
    model = shared()
    inputs = example(model, 2)
    pruned = prune(model, rule="aot_video", **OPTIONS)
    out = pruned(**inputs)
    torch._dynamo.reset()
    ideal = prune(model, replay=pruned.recording, rule="aot_video", **OPTIONS)
    assert difference(ideal(**inputs).logits, out.logits) == 0


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    model = shared()
    inputs = example(model, 2, frames=3)
    options = OPTIONS | {"clip": 2}
    checked(prune(model, "inductor", rule="aot_video", **options), inputs, model, tolerance=1e-4, **options)


def test_generate_equals_runs_by_hand() -> None:
    model = sized(5).build()
    inputs = example(model, 2)
    longer, expected = dict(inputs), []
    for done in range(STEPS):
        expected.append(aot_video.run(model, longer, **OPTIONS, generated=done).logits[:, -1])
        word = expected[-1].argmax(-1, keepdim=True)
        longer["input_ids"] = torch.cat([longer["input_ids"], word], 1)
        longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(word)], 1)
    tokcompile.compile(model, rule="aot_video", target="eager", **OPTIONS)
    out = model.generate(**inputs, **greedy(STEPS))
    assert difference(torch.stack(out.logits, 1), torch.stack(expected, 1)) <= 1e-4


def test_an_exported_program_is_rewritten() -> None:
    model = shared()
    inputs = example(model, 2) | {"use_cache": False}
    program = tokcompile.export(model, inputs)
    ran = aot_video.run(model, inputs, **OPTIONS)
    rewritten = tokcompile.rewrite(program, rule="aot_video", **OPTIONS)
    with torch.no_grad():
        logits = rewritten.module()(**inputs).logits
    assert difference(logits, ran.logits) <= 1e-5


def test_places_and_constants_of_the_paper() -> None:
    resolved = load_rule("aot_video").bind().resolve(FACTS)
    places = [step.at for step in resolved.steps if hasattr(step, "at")]
    assert places == ["vision.5.attention", "vision.24.attention", "projector.patches", "projector.output"]
    within, between = (step for step in resolved.steps if step.verb == "merge")
    assert (within.distance, within.temperature, within.hard, within.marginals) == (0.5, 0.1, 0.1, "plan")
    assert (between.clip, between.ratio, between.spread, between.temperature) == (4, Fraction(3, 10), 1.5, 0.1)
    selects = {step.name: step for step in resolved.steps if step.verb == "select"}
    assert [resolved.budget(selects[name], 729) for name in ("local", "chosen")] == [63, 126]
    assert resolved.budget(selects["kept"], 196) == 27


def test_an_image_is_refused() -> None:
    model = fleet.shared("llava")
    pruned = prune(model, rule="aot_video", anchors=5, windows=2, cells=4)
    with pytest.raises(Exception, match="aot_video.yaml") as caught:
        pruned(**fleet.example(model, 2))
    assert "frames of videos" in refusal(caught.value).cause and "videos" in refusal(caught.value).remedy
    assert pruned.report.graphs == []


def test_clips_that_would_become_longer_are_refused() -> None:
    model = shared()
    pruned = prune(model, rule="aot_video", anchors=20, windows=1, cells=8, clip=2, ratio=0.9)
    with pytest.raises(Exception, match="would become longer") as caught:
        pruned(**example(model, 2))
    assert refusal(caught.value).found == "23 tokens of 2 frames of 9"


POOLED = """
rule: mine
about: Choose among pooled features.
params: {}
steps:
  - score: {name: long, by: norm, at: AT}
  - select: {name: stay, by: topk, scores: long, keep: 5}
  - select: {name: cells, by: pooled, of: stay, keep: 2}
  - merge: {by: clips, at: projector.output, keep: WHICH, clip: 4, ratio: 0.5}
"""


def mine(folder: Path, at: str, which: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(POOLED.replace("AT", at).replace("WHICH", which))
    return str(path)


def test_frames_are_merged_without_the_first_stage(tmp_path: Path) -> None:
    """Patches chosen by length, at the new address; the features stay as the model pools them."""
    model = shared()
    inputs = example(model, 2)
    pruned = prune(model, rule=mine(tmp_path, "projector.patches", "cells"))
    pruned(**inputs)
    with torch.no_grad():
        pixels = inputs["pixel_values_videos"].flatten(0, 1)
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        sizes = model.model.multi_modal_projector(states).norm(dim=-1)
    best = [aot_video.naive.best(row, range(25), 5) for row in sizes]
    shares = aot_video.pooled_shares(model, best, 5)
    assert pruned.kept[0] == [aot_video.naive.best(row, range(9), 2) for row in shares]


@pytest.mark.parametrize(
    ("at", "which", "cause"),
    [
        ("projector.patches", "stay", "clips are merged where each row holds the frames of videos"),
        ("projector.output", "cells", "a budget per image needs the images' own axis"),
    ],
)
def test_selections_among_other_tokens_are_refused(at: str, which: str, cause: str, tmp_path: Path) -> None:
    model = shared()
    pruned = prune(model, rule=mine(tmp_path, at, which))
    with pytest.raises(Exception, match="mine.yaml") as caught:
        pruned(**example(model, 2))
    assert cause in refusal(caught.value).cause


@pytest.mark.slow
def test_a_model_whose_projector_reads_all_images_in_one_is_refused(tmp_path: Path) -> None:
    it = families.subject(family("qwen2_5_vl"), images=0, videos=1)
    pruned = prune(it.model, rule=mine(tmp_path, "projector.patches", "cells"))
    with pytest.raises(Exception, match="projector.patches") as caught:
        pruned(**it.inputs)
    assert "in one sequence" in refusal(caught.value).cause


WRITTEN = """
rule: mine
about: Pour patches into some, and leave them where they are.
params: {}
steps:
  - score: {name: long, by: norm, at: vision.1.output}
  - select: {name: stay, by: topk, scores: long, keep: 5}
  - merge: {by: transport, at: AT, keep: stay, write_back: true}
  - score: {name: again, by: norm, at: projector.patches}
  - select: {name: left, by: topk, scores: again, keep: 4}
  - drop: {at: projector.output, keep: left, positions: compact}
"""


@pytest.mark.parametrize("name", ["llava", pytest.param("llava-siglip-qwen2", marks=pytest.mark.slow)])
def test_written_back_tokens_are_scored_and_dropped_like_the_models_own(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(WRITTEN.replace("AT", "projector.patches"))
    model, (inputs, side) = fleet.shared(name), (fleet.example(fleet.shared(name), 2), 4)
    pruned = prune(model, rule=str(path))
    out = pruned(**inputs)
    with torch.no_grad():
        pixels, config = inputs["pixel_values"], model.config
        states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        plain = slice(1, None) if config.vision_feature_select_strategy == "default" else slice(None)
        first = [aot_video.naive.best(row, range(16), 5) for row in states[2][:, plain].norm(dim=-1)]
        features = model.model.multi_modal_projector(aot_video.naive.vision_features(model, pixels))
        for frame, kept in zip(features, first, strict=True):
            frame[kept] = poured(frame.clone(), kept, side)
        left = [aot_video.naive.best(row, range(16), 4) for row in features.norm(dim=-1)]
        features = torch.stack([frame[kept] for frame, kept in zip(features, left, strict=True)])
        ran = aot_video.aot.merged_text(model, inputs, features, left)
    assert pruned.kept == [first, *ran.kept]
    assert difference(out.logits, ran.logits) <= 1e-5


def poured(x: Tensor, kept: list[int], side: int) -> Tensor:
    """Transport alone in one step: the rule's step leaves `hard` and `iterations` as they are."""
    before = aot_video.aot.HARD, aot_video.aot.ITERATIONS
    aot_video.aot.HARD, aot_video.aot.ITERATIONS = 0, 1
    try:
        return aot_video.aot.poured(x, kept, side)
    finally:
        aot_video.aot.HARD, aot_video.aot.ITERATIONS = before
