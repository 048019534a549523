"""Example inputs of a model, by what its configuration says: a short text, an image, or both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tokcompile.capturing.capture import unloaded
from tokcompile.errors import RuleError
from tokcompile.models import catalogue

Size = tuple[int, int]
"""Height and width of an image, in pixels."""

DEFAULT_SIZE: Size = (448, 448)
"""Of the image for a model that takes images of any size."""

_TEXT_LENGTH = 16
_LEADING = 1
_OWN_INPUTS = "call tokcompile.report.explain(model, inputs, rules) with inputs of your own"


def example_inputs(model: nn.Module, batch: int, image: Size | None = None) -> dict[str, Tensor]:
    """Inputs of one image and a short text, a text, or an image.

    Those of a family of the catalogue that takes images of any size, or in parts, are made as the catalogue makes
    them, and hold values also where the model's weights hold none: models read sizes of images as numbers.

    Args:
        model: with a configuration of transformers; its weights may be shapes alone.
        batch: rows.
        image: for a model that takes images of any size.

    Raises:
        TokredError: no inputs are known for this kind of model, or it takes no image of that size.
    """
    family = catalogue.of_type(model.config.model_type)
    if family is not None and family.kind == "vlm" and family.inputs != "whole":
        any_size = {"sizes", "grids"} & family.options.keys()
        size = image or (DEFAULT_SIZE if any_size else None)
        return family.example(model, batch, length=_LEADING + _TEXT_LENGTH, image=size)
    needs_no_size(model, image)
    empty = unloaded(model)
    with torch.no_grad(), empty.fake_mode if isinstance(empty, FakeTensor) else nullcontext():
        return _by_configuration(model, batch)


def needs_no_size(model: nn.Module, image: Size | None) -> None:
    """Refuse a size of images for a model whose images have one size, or that takes none.

    Raises:
        RuleError: a size was given.
    """
    if image is None:
        return
    own = getattr(getattr(model.config, "vision_config", model.config), "image_size", None)
    raise RuleError(
        f"a '{model.config.model_type}' model takes no image of {image[0]} x {image[1]} pixels",
        found="it takes no images" if own is None else f"its configuration states image_size {own}",
        remedy="leave the size of the image out",
    )


def text_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Token numbers and a mask without padding, both int64 [batch, total]."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_size(text: str | None) -> Size | None:
    """Read HEIGHTxWIDTH; None where nothing was said.

    Raises:
        RuleError: it is no such size.
    """
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise RuleError("the size of the image cannot be read", found=text, remedy="HEIGHTxWIDTH in pixels: 448x672")
    return int(parts[0]), int(parts[1])


def _by_configuration(model: nn.Module, batch: int) -> dict[str, Tensor]:
    config = model.config
    vision = getattr(config, "vision_config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if vision is None and getattr(config, "image_size", None) is None:
        return text_inputs(torch.full((batch, _TEXT_LENGTH), 5))
    pixels = _pixels(vision or config, batch, model)
    if vision is None or getattr(text, "vocab_size", None) is None:
        return {"pixel_values": pixels}
    token = next(
        (t for t in (getattr(config, a, None) for a in ("image_token_id", "image_token_index")) if t is not None), None
    )
    if token is None:
        return text_inputs(torch.full((batch, _TEXT_LENGTH), 5)) | {"pixel_values": pixels}
    image = _image_tokens(model, pixels) // batch
    row = torch.tensor([1] * _LEADING + [token] * image + [5] * _TEXT_LENGTH)
    return text_inputs(row.expand(batch, -1)) | {"pixel_values": pixels}


def _pixels(config: Any, batch: int, model: nn.Module) -> Tensor:
    size = getattr(config, "image_size", None)
    if size is None:
        raise RuleError(
            f"no example image is known for a '{config.model_type}' vision tower",
            found="its configuration states no image_size",
            remedy=_OWN_INPUTS,
        )
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(config, "num_channels", 3)
    return torch.zeros(batch, channels, height, width, dtype=model.dtype, device=model.device)


def _image_tokens(model: nn.Module, pixels: Tensor) -> int:
    """Rows that the model makes of the images: its own code says so better than any formula."""
    try:
        found = model.get_image_features(pixel_values=pixels)
    except Exception as error:
        raise RuleError(
            "the number of image tokens of this model is not known",
            found=f"get_image_features: {type(error).__name__}: {error}"[:300],
            remedy=_OWN_INPUTS,
        ) from error
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (tuple, list)) else [found]
    return sum(part.shape[:-1].numel() for part in parts)


def longer(inputs: Mapping[str, Tensor], words: int, largest: int) -> dict[str, Tensor]:
    """Inputs with so many random words after them, in all that has a value for every token.

    Args:
        inputs: with input_ids, int64 [batch, total].
        words: how many.
        largest: tokens are drawn below this number.
    """
    ids = inputs["input_ids"]
    rng = torch.Generator().manual_seed(0)
    made = {}
    for name, value in inputs.items():
        made[name] = value
        if value.shape[:2] == ids.shape:
            last = value[:, -1:]  # a word's, as the text of every example ends with some
            more = last.expand(-1, words, *last.shape[2:])
            if name == "input_ids":
                more = torch.randint(5, largest, more.shape, generator=rng).to(value.device)
            made[name] = torch.cat([value, more], 1)
    return made
