"""Models that read the sizes of their images: several images, videos, later steps, and what is left as it was."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from core.test_family_generate import by_hand
from harness import difference, greedy, prune
from torch import Tensor, nn

import tokcompile
from tokcompile.capturing import imagesizes
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SOME = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "qwen3_vl" else (pytest.mark.slow,)) for name in PACKED]
)
IMAGE, VIDEO = [1, 6, 12], [2, 4, 8]


def subject(name: str, inputs: dict[str, Any] | None = None, **example: Any) -> families.Subject:
    """A family with other inputs than its usual ones."""
    return families.subject(catalogue.family(name), inputs, **example)


def image_after_video(name: str) -> dict[str, Tensor]:
    """Two rows, the second padded, of text, a video of two frames, text, an image, and text."""
    config = catalogue.family(name).build().config
    vision = config.vision_config
    merged = vision.spatial_merge_size**2
    rng = torch.Generator().manual_seed(0)
    text = lambda n: torch.randint(5, 60, (2, n), generator=rng)  # noqa: E731
    marked = lambda token, n: torch.full((2, n), token)  # noqa: E731
    frame, image = math.prod(VIDEO[1:]) // merged, math.prod(IMAGE) // merged
    # Models that tell frames apart by time stamps have text between them; for others a video is one run of tokens.
    stamped = name == "qwen3_vl"
    frames = [marked(config.video_token_id, frame), text(2), marked(config.video_token_id, frame)]
    video = frames if stamped else [marked(config.video_token_id, 2 * frame), text(2)]
    ids = torch.cat([text(5), *video, text(3), marked(config.image_token_id, image), text(6)], 1)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    types = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": types,
        "pixel_values": torch.randn(2 * math.prod(IMAGE), values, generator=rng),
        "image_grid_thw": torch.tensor([IMAGE, IMAGE]),
        "pixel_values_videos": torch.randn(2 * math.prod(VIDEO), values, generator=rng),
        "video_grid_thw": torch.tensor([VIDEO, VIDEO]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_two_images_of_different_sizes(name: str, tmp_path: Path) -> None:
    it = subject(name, images=2)
    assert len({tuple(grid) for grid in it.inputs["image_grid_thw"].tolist()}) == 2
    families.check_drop(it, tmp_path)


@SOME
@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_image_after_a_video(name: str, block: int, tmp_path: Path) -> None:
    """Tokens of both are up for choice, and features added to later layers stay with their tokens."""
    it = subject(name, image_after_video(name))
    kept = families.check_drop(it, tmp_path, block)
    seen = it.inputs["mm_token_type_ids"] > 0
    assert [sum(seen[row, token].item() for token in tokens) for row, tokens in enumerate(kept)] == [7, 7]


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_ten_steps_after_two_images(name: str, tmp_path: Path) -> None:
    short = {"images": 2, "length": 10}  # no sequence is as long as the stream is wide, which a run by hand goes by
    it = subject(name, **short)
    _, (kept,) = families.dropped(it, "decoder", tmp_path, keep=7)
    expected = by_hand(it, kept, steps=10)
    torch._dynamo.reset()
    tokcompile.compile(it.model, target="eager", **families.options_for(it, "decoder", tmp_path, keep=7))
    prompt = it.family.example(it.model, batch=2, padded=True, **short)
    got = torch.stack(it.model.generate(**prompt, **greedy(10)).logits, 1)
    assert difference(got, expected) <= 1e-4


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
def test_what_is_computed_before_changes_nothing(name: str) -> None:
    """The same numbers as the model's own, but for the order in which attention adds up."""
    family = catalogue.family(name)
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        prepared = tokcompile.precompute(model, inputs)
        assert difference(model(**prepared, use_cache=False).logits, expected) <= 1e-5
        with imagesizes.packed(model):
            assert difference(model(**prepared, use_cache=False).logits, expected) <= 1e-4
        assert difference(model(**inputs, use_cache=False).logits, expected) == 0


def test_other_models_and_text_are_left_as_they_are() -> None:
    family = catalogue.family("llama")
    model = family.build()
    inputs = family.example(model)
    assert tokcompile.precompute(model, inputs) == inputs
    assert tokcompile.precompute(nn.Linear(2, 2), {"input": 1}) == {"input": 1}
    packed = catalogue.family("qwen2_vl").build()
    assert tokcompile.precompute(packed, inputs) == inputs


def test_an_export_of_a_model_as_a_user_makes_it(tmp_path: Path) -> None:
    """The model stays as it is; the program takes what `precompute` returns, and so does the rewritten one."""
    family = catalogue.family("qwen3_vl")
    model = family.build()
    inputs = family.example(model, batch=2, padded=True) | {"use_cache": False}
    program = tokcompile.export(model, inputs)
    assert imagesizes.packed_tower(model).config._attn_implementation == "sdpa"
    prepared = tokcompile.precompute(model, inputs)
    with torch.no_grad():
        expected = model(**inputs).logits
        assert difference(program.module()(**prepared).logits, expected) <= 1e-4
        path = families.rule(tmp_path, "group", "decoder")
        pruned = tokcompile.rewrite(program, path, keep=7, among="image")
        assert pruned.module()(**prepared).logits.shape[1] == expected.shape[1] - 11


def test_a_new_grid_is_no_new_program(tmp_path: Path) -> None:
    """Grids of as many patches share a graph: what differs between them are inputs."""
    it = subject("qwen2_vl")
    assert it.program
    torch._dynamo.reset()
    compiled = prune(it.model, rule=families.rule(tmp_path, "group", "decoder"), keep=7, among="image")
    raw = it.family.example(it.model, batch=2, padded=True) | {"use_cache": False}
    for grid in ([1, 6, 12], [1, 12, 6], [1, 4, 18]):
        inputs = tokcompile.precompute(it.model, raw | {"image_grid_thw": torch.tensor([grid, grid])})
        got = compiled(**inputs).logits
        other = families.Subject(it.family, it.model, inputs)
        other.program = it.program  # captured once: capturing again would compile again what is counted
        assert families.compared([got], families.hand_run(other, "decoder", compiled.kept[-1])) == 0
    assert len(compiled.report.graphs) == 1


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("idefics3", marks=pytest.mark.slow)])
def test_an_empty_tile_fails_when_run(name: str, tmp_path: Path) -> None:
    """The model leaves it out, with its tokens: fewer than were counted, and nothing is computed wrongly."""
    it = subject(name)
    compiled = prune(it.model, rule=families.rule(tmp_path, "group", "decoder"), keep=7, among="image")
    torch._dynamo.reset()
    compiled(**it.inputs)
    inputs = {key: value.clone() if isinstance(value, Tensor) else value for key, value in it.inputs.items()}
    inputs["pixel_values"][:, -1] = 0
    images = inputs["input_ids"] == it.model.config.image_token_id
    inputs["input_ids"][images & (images.cumsum(1) > images.sum(1, keepdim=True) // 2)] = 5
    with torch.no_grad():
        it.model(**inputs)  # a prompt that the model takes
    with pytest.raises(RuntimeError, match="different numbers of image tokens"):
        compiled(**inputs)
