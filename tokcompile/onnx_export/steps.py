"""The model that goes on where a prompt's file stops: one token at a time, from the caches that it returned."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tokcompile.capturing import attention
from tokcompile.errors import CaptureError
from tokcompile.onnx_export.dynamic import PAST, TOTAL, Axes


def prompt_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its padding mask and its positions, [B, T], as `generate` counts them: steps count on from there.

    Raises:
        CaptureError: there is no text, or the model takes no cache.
    """
    taken = inspect.signature(model.forward).parameters
    if "input_ids" not in inputs or "past_key_values" not in taken:
        raise CaptureError(
            "a model that goes on after a prompt takes `input_ids` and `past_key_values`",
            found=", ".join(inputs),
            remedy="export the prompt alone, without `decode`",
        )
    given = dict(inputs)
    given.setdefault("attention_mask", torch.ones_like(given["input_ids"]))
    if "position_ids" in taken:
        given.setdefault("position_ids", (given["attention_mask"].cumsum(1) - 1).clamp(min=0))
    return given


@torch.no_grad()
def step_inputs(prompt: ExportedProgram, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The step after a prompt, as an example.

    Args:
        prompt: the rewritten program.
        inputs: what `prompt_inputs` made.
    """
    out = prompt.module()(**inputs)
    cache = getattr(out, "past_key_values", None)
    if cache is None:
        raise CaptureError("the prompt returns no cache to go on from", remedy="a model with use_cache=True")
    ids, mask = inputs["input_ids"][:, -1:], inputs["attention_mask"]
    mask = torch.cat([mask, torch.ones_like(ids)], 1)
    step = {"input_ids": ids.clone(), "attention_mask": mask, "past_key_values": cache}
    return step | ({"position_ids": mask.sum(1, keepdim=True) - 1} if "position_ids" in inputs else {})


@contextmanager
def masks_that_fit(model: nn.Module, cache: Any) -> Iterator[None]:
    """While this lasts, attention has masks that fit caches of different lengths, where a cache has such.

    transformers makes one mask for all layers, by the length of the first one's cache.
    """
    lengths = {layer.keys.shape[2] for layer in cache.layers if layer.keys is not None}
    before = attention.install(model) if len(lengths) > 1 else None
    try:
        yield
    finally:
        if before is not None:
            attention.restore(model, before)


def step_axes(step: Mapping[str, Any], prompt: Mapping[str, Axes]) -> dict[str, Axes]:
    """Open dimensions of a step: the batch if it is open in the prompt, and always how much was there before."""
    called = prompt.get("input_ids", {}).get(0)
    batch = {0: called} if called else {}
    axes: dict[str, Axes] = {name: dict(batch) for name, value in step.items() if isinstance(value, Tensor)}
    axes["attention_mask"] = {**batch, 1: TOTAL}
    return {name: each for name, each in axes.items() if each} | {"past_key_values": {**batch, 2: PAST}}
