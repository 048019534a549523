"""Every vision-language family of the catalogue builds, runs, looks at its images and ignores its padding."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokcompile.models.catalogue import families, family

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [name for name, line in families().items() if line.kind == "vlm"]
SHAPES = {
    "one": {"batch": 1},
    "padded": {"batch": 2, "padded": True},
    "two images": {"batch": 1, "images": 2},
    "two padded rows of two images": {"batch": 2, "padded": True, "images": 2},
}
PLACES = 5


@cache
def built(name: str) -> nn.Module:
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_sees_its_pixels(name: str, shape: str) -> None:
    inputs = family(name).example(built(name), **SHAPES[shape])
    assert inputs.keys() <= inspect.signature(built(name).forward).parameters.keys()
    assert (inputs["input_ids"][:, -1] >= 5).all(), "the last token is text"
    out, real = logits(name, inputs), inputs["attention_mask"].bool()
    assert out[real].isfinite().all()
    other = logits(name, {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)})
    assert (_apart(out, other) > 1e-3).all(), "the pixels don't reach the last token"


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_sees_its_own_images_only(name: str, images: int) -> None:
    inputs = family(name).example(built(name), batch=2, images=images)
    # Whatever the form of the pixels is, those of the first row come first.
    pixels = inputs["pixel_values"].flatten().clone()
    pixels[len(pixels) // 2 :] *= -1
    out, other = (
        logits(name, {**inputs, "pixel_values": p.view_as(inputs["pixel_values"])})
        for p in (inputs["pixel_values"], pixels)
    )
    first, second = _apart(out, other)
    assert first < 1e-4 and second > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_padding_changes_nothing(name: str) -> None:
    inputs = family(name).example(built(name), batch=2, images=2)
    wide = logits(name, widened(inputs, PLACES))[:, PLACES:]
    torch.testing.assert_close(wide, logits(name, inputs), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_padded_rows_keep_their_image_tokens(name: str) -> None:
    image = built(name).config.image_token_id
    plain, padded = (family(name).example(built(name), batch=3, padded=p, images=2) for p in (False, True))
    counts = (plain["input_ids"] == image).sum(1)
    assert (counts == (padded["input_ids"] == image).sum(1)).all() and (counts == counts[0]).all()
    assert (padded["attention_mask"] == 0).sum(1).tolist() == [3, 0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same(name: str) -> None:
    again = family(name).build()
    assert all(torch.equal(a, b) for a, b in zip(built(name).parameters(), again.parameters(), strict=True))
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
