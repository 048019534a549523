"""A question about an image to the small model of the demo, as ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tokcompile.errors import RuleError, known
from tokcompile.models import digits
from tokcompile.onnx_export import generator
from tokcompile.onnx_export.extra import needs


def answer(prefill: Path, decode: Path | None, image: Path, question: str, tokens: int) -> list[str]:
    """The words that the model generates.

    Raises:
        RuleError: a file is not there or another one, or the question has a word that the model does not know.
        LowerError: ONNX Runtime is missing.
    """
    needs("onnxruntime")
    inputs = {"input_ids": _prompt(question), "pixel_values": _pixels(image)}
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    first = _session(prefill)
    later = None if decode is None else _session(decode)
    found = generator.generate(first, later, inputs, 1 if later is None else tokens, digits.EOS)
    return [digits.VOCABULARY[token] for token in found[0] if token != digits.EOS]


def _session(path: Path) -> Any:
    if not path.is_file():
        raise RuleError(f"no file '{path}'", remedy="tokred export zoo:llava-digits RULE -o FILE")
    return generator.session(path)


def _prompt(question: str) -> np.ndarray:
    words = question.lower().replace("?", " ").split()
    unknown = [word for word in words if word not in digits.TOKEN]
    if unknown:
        raise RuleError(
            f"the model does not know the word '{unknown[0]}'",
            found=question,
            remedy=known(unknown[0], [word for word in digits.VOCABULARY if word.isalpha()]),
        )
    ids = [digits.BOS, *[digits.IMAGE] * digits.IMAGE_TOKENS, *(digits.TOKEN[word] for word in words)]
    return np.array([ids], np.int64)


def _pixels(path: Path) -> np.ndarray:
    """An image as float32 [1, 3, 112, 112], as the model was trained on."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((digits.IMAGE_SIZE, digits.IMAGE_SIZE))
    except (OSError, UnidentifiedImageError) as error:
        raise RuleError(
            f"'{path}' cannot be read as an image", found=str(error), remedy="a PNG or JPEG file"
        ) from error
    scaled = np.asarray(image, np.float32) / 255
    return ((scaled - digits.MEAN) / digits.STD).transpose(2, 0, 1)[None].astype(np.float32)
