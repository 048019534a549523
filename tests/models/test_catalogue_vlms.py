"""Every vision-language family of the catalogue builds, runs, looks at its images or videos and ignores its padding."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
import unloaded
from torch import Tensor, nn
from torch.nn import functional as F

from tokcompile.errors import TokredError
from tokcompile.models.catalogue import families, family

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name, line in families().items() if line.kind == "vlm"]
FILMED = [name for name in NAMES if family(name).videos]
SHAPES = {
    "one": {"batch": 1},
    "padded": {"batch": 2, "padded": True},
    "two images": {"batch": 1, "images": 2},
    "two padded rows of two images": {"batch": 2, "padded": True, "images": 2},
}
VIDEO_SHAPES = {
    "one": {"batch": 1, "videos": 1},
    "padded": {"batch": 2, "padded": True, "videos": 1},
    "two padded rows of two videos": {"batch": 2, "padded": True, "videos": 2},
}
PLACES = 5
ALL_SEEN_UNPADDED = ("paligemma",)
"""Where transformers' text is causal under a padding mask, but each token sees all where nothing is padded."""


def test_every_family_that_takes_pixels_of_videos_has_videos() -> None:
    here = [n for n in NAMES if not unloaded.missing(family(n).needs)]
    taking = [n for n in here if "pixel_values_videos" in inspect.signature(built(n).forward).parameters]
    assert taking == [n for n in FILMED if n in here]


@cache
def built(name: str) -> nn.Module:
    if why := unloaded.missing(family(name).needs):
        pytest.skip(why)
    return family(name).build()


@torch.no_grad()
def logits(name: str, inputs: dict[str, Tensor]) -> Tensor:
    return built(name)(**inputs).logits


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """How far the logits of each row's last token are apart."""
    return (one - other).abs().amax(-1)[:, -1]


def widened(inputs: dict[str, Tensor], places: int) -> dict[str, Tensor]:
    """The same with padding before each row, in all that has a value for every token."""
    batch, total = inputs["input_ids"].shape
    return {
        name: F.pad(value, (0, 0) * (value.ndim - 2) + (places, 0)) if value.shape[:2] == (batch, total) else value
        for name, value in inputs.items()
    }


def _sees(name: str, inputs: dict[str, Tensor], pixels: str) -> None:
    """The model takes these inputs, and the last token of each row sees what the pixels are."""
    assert inputs.keys() <= inspect.signature(built(name).forward).parameters.keys()
    assert (inputs["input_ids"][:, -1] >= 5).all(), "the last token is text"
    out, real = logits(name, inputs), inputs["attention_mask"].bool()
    assert out[real].isfinite().all()
    other = logits(name, {**inputs, pixels: inputs[pixels].flip(-1)})
    assert (_apart(out, other) > 1e-3).all(), "the pixels don't reach the last token"


def _sees_its_own(name: str, inputs: dict[str, Tensor], pixels: str) -> None:
    """Of two rows, the first does not see the second's pixels."""
    # Whatever the form of the pixels is, those of the first row come first.
    changed = inputs[pixels].flatten().clone()
    changed[len(changed) // 2 :] *= -1
    first, second = _apart(logits(name, inputs), logits(name, {**inputs, pixels: changed.view_as(inputs[pixels])}))
    assert first < 1e-4 and second > 1e-3


def _ignores_padding(name: str, inputs: dict[str, Tensor]) -> None:
    wide = logits(name, widened(inputs, PLACES))[:, PLACES:]
    torch.testing.assert_close(wide, logits(name, inputs), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_sees_its_pixels(name: str, shape: str) -> None:
    _sees(name, family(name).example(built(name), **SHAPES[shape]), "pixel_values")


@pytest.mark.parametrize("shape", VIDEO_SHAPES)
@pytest.mark.parametrize("name", FILMED)
def test_runs_and_sees_its_video(name: str, shape: str) -> None:
    _sees(name, family(name).example(built(name), images=0, **VIDEO_SHAPES[shape]), "pixel_values_videos")


@pytest.mark.parametrize("name", FILMED)
def test_every_frame_is_seen(name: str) -> None:
    """Of what comes one after another, frames or patches, the first and the last."""
    inputs = family(name).example(built(name), images=0, videos=1)
    pixels = inputs["pixel_values_videos"]
    out = logits(name, inputs)
    for place in (0, -1):
        changed = pixels.squeeze(0).clone()
        changed[place] *= -1
        assert _apart(out, logits(name, {**inputs, "pixel_values_videos": changed.view_as(pixels)})) > 1e-5


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_sees_its_own_images_only(name: str, images: int) -> None:
    _sees_its_own(name, family(name).example(built(name), batch=2, images=images), "pixel_values")


@pytest.mark.parametrize("videos", [1, 2])
@pytest.mark.parametrize("name", FILMED)
def test_a_row_sees_its_own_videos_only(name: str, videos: int) -> None:
    inputs = family(name).example(built(name), batch=2, images=0, videos=videos)
    _sees_its_own(name, inputs, "pixel_values_videos")


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str) -> None:
    _ignores_padding(name, family(name).example(built(name), batch=2, images=2))


@pytest.mark.parametrize("name", FILMED)
def test_padding_before_a_video_changes_nothing(name: str) -> None:
    _ignores_padding(name, family(name).example(built(name), batch=2, images=0, videos=2))


@pytest.mark.parametrize("name", NAMES)
def test_text_only_runs_and_ignores_padding(name: str) -> None:
    inputs = family(name).example(built(name), batch=2, padded=True, images=0)
    assert {key: value.shape for key, value in inputs.items()} == dict.fromkeys(
        ("input_ids", "attention_mask"), (2, 17)
    )
    assert logits(name, inputs)[inputs["attention_mask"].bool()].isfinite().all()
    if name not in ALL_SEEN_UNPADDED:
        _ignores_padding(name, family(name).example(built(name), batch=2, images=0))


def test_videos_that_cannot_be_had_are_an_error_with_a_remedy() -> None:
    with pytest.raises(TokredError, match="'llava' takes no videos\n.*try: .*qwen3_vl"):
        family("llava").example(built("llava"), images=0, videos=1)
    with pytest.raises(TokredError, match="(?s)images or videos, not both.*try: images=0"):
        family("qwen3_vl").example(built("qwen3_vl"), videos=1)


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_keep_their_image_tokens(name: str) -> None:
    _keeps_its_tokens(name, built(name).config.image_token_id, images=2)


@pytest.mark.parametrize("name", FILMED)
def test_padded_rows_keep_their_video_tokens(name: str) -> None:
    _keeps_its_tokens(name, built(name).config.video_token_id, images=0, videos=2)


def _keeps_its_tokens(name: str, token: int, **example: int) -> None:
    plain, padded = (family(name).example(built(name), batch=3, padded=p, **example) for p in (False, True))
    counts = (plain["input_ids"] == token).sum(1)
    assert (counts == (padded["input_ids"] == token).sum(1)).all() and (counts == counts[0]).all() and counts[0]
    assert (padded["attention_mask"] == 0).sum(1).tolist() == [3, 0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same(name: str) -> None:
    model, again = built(name), family(name).build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    first, second = (family(name).example(again, batch=2) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [n for n in NAMES if family(n).inputs == "patches"])
def test_given_positions_are_those_of_the_model(name: str) -> None:
    line = family(name)
    given = line.model_copy(update={"options": {**line.options, "positions": True}})
    inputs = given.example(built(name), batch=2, padded=True, images=2)
    assert inputs["position_ids"].shape == (3, *inputs["input_ids"].shape)
    without = {key: value for key, value in inputs.items() if key != "position_ids"}
    assert torch.equal(logits(name, inputs), logits(name, without))
