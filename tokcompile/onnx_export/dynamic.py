"""Which dimensions of a model's inputs stay open in an ONNX file, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from tokcompile.capturing import imagesizes
from tokcompile.errors import CaptureError

Axes = Mapping[int, str]
BATCH, LENGTH, PAST, TOTAL = "batch", "length", "past", "total"
"""Names of rows, tokens of a prompt, cached tokens, and all tokens that a step after a prompt knows of."""


def axes_of(model: nn.Module, inputs: Mapping[str, Any], dynamic: bool | Mapping[str, Axes]) -> dict[str, Axes]:
    """Names of the open dimensions of each input.

    Args:
        inputs: an example.
        dynamic: such names, `{"input_ids": {0: "batch", 1: "length"}}`: one name is one size wherever it stands. True
            for the batch of every input, the length of those that are whole numbers [B, T], and of caches.

    Raises:
        CaptureError: no such input or dimension; True for a model that reads sizes of images, or for a single row.
    """
    if dynamic is False:
        return {}
    if dynamic is not True:
        for name, axes in dynamic.items():
            _check(inputs, name, axes)
        return dict(dynamic)
    if imagesizes.packed_tower(model) is not None:
        raise CaptureError(
            "which sizes of this model may be dynamic has to be said: it computes with sizes of images",
            remedy="dynamic={INPUT: {DIMENSION: NAME}}, or dynamic=False",
        )
    found = {name: _usual(value) for name, value in inputs.items()}
    single = [n for n, v in inputs.items() if found[n] and isinstance(v, Tensor) and v.shape[0] < 2]
    if single:
        raise CaptureError(
            "a dynamic batch needs an example of two rows or more: torch takes one row for a batch of one",
            found=", ".join(f"{name} {list(inputs[name].shape)}" for name in single),
            remedy="repeat the example's rows, or dynamic=False",
        )
    return {name: axes for name, axes in found.items() if axes}


def _usual(value: Any) -> Axes:
    if is_cache(value):
        return {0: BATCH, 2: PAST}
    if not isinstance(value, Tensor) or value.ndim < 2:
        return {}
    whole = value.ndim == 2 and not value.is_floating_point()
    return {0: BATCH, 1: LENGTH} if whole else {0: BATCH}


def _check(inputs: Mapping[str, Any], name: str, axes: Axes) -> None:
    value = inputs.get(name)
    if value is None:
        raise CaptureError(f"no input '{name}' to be dynamic", found=", ".join(inputs), remedy="one of these")
    rank = 4 if is_cache(value) else getattr(value, "ndim", 0)
    for axis in axes:
        if not 0 <= axis < rank:
            raise CaptureError(
                f"input '{name}' has no dimension {axis}", found=f"{rank} dimensions", remedy=f"0 to {rank - 1}"
            )


def is_cache(value: Any) -> bool:
    """Whether an input is a cache of transformers."""
    return hasattr(value, "layers") and hasattr(value, "get_seq_length")


def dynamic_shapes(inputs: Mapping[str, Any], axes: Mapping[str, Axes]) -> dict[str, Any] | None:
    """What torch.export is told: a named `Dim` for each name; None where nothing is open.

    Caches whose layers hold different numbers of keys have a length for each such number: `past_0`, `past_1`….
    """
    if not axes:
        return None
    dims: dict[str, Any] = {}
    return {name: _shapes(value, axes.get(name, {}), dims) for name, value in inputs.items()}


def _shapes(value: Any, axes: Axes, dims: dict[str, Any]) -> Any:
    if not is_cache(value):
        return {axis: _dim(name, dims) for axis, name in axes.items()} if isinstance(value, Tensor) else None
    _, spec = pytree.tree_flatten(value)
    if spec.is_leaf():
        raise CaptureError(f"torch.export does not know the cache {type(value).__name__}", remedy="a DynamicCache")
    names = cache_axes(value, axes)
    layers = [{axis: _dim(name, dims) for axis, name in each.items()} for each in names]
    return [layers, layers]


def cache_axes(cache: Any, axes: Axes) -> list[dict[int, str]]:
    """Names of the open dimensions of each layer's keys and values [B, H, T, D]."""
    lengths = [layer.keys.shape[2] for layer in cache.layers if layer.keys is not None]
    kinds = list(dict.fromkeys(lengths))
    each = []
    for length in lengths:
        suffix = f"_{kinds.index(length)}" if len(kinds) > 1 else ""
        each.append({axis: name + (suffix if axis == 2 else "") for axis, name in axes.items()})
    return each


def named(inputs: Mapping[str, Any], axes: Mapping[str, Axes]) -> dict[str, Axes]:
    """The same open dimensions by names of inputs in an ONNX file, where each tensor of a cache is one."""
    found = {name: held for name, held in axes.items() if not is_cache(inputs[name])}
    for name in axes.keys() - found.keys():
        for layer, held in enumerate(cache_axes(inputs[name], axes[name])):
            found |= {f"past.{layer}.key": held, f"past.{layer}.value": held}
    return found


def _dim(name: str, dims: dict[str, Any]) -> Any:
    if name == TOTAL or name.startswith(PAST):  # how one follows from the other depends on the rule
        return Dim.AUTO
    if name not in dims:
        dims[name] = Dim(name)
    return dims[name]


def symbols(program: torch.export.ExportedProgram, axes: Mapping[str, Axes], names: list[str]) -> dict[str, str]:
    """The name of each symbol that stands for an open dimension of a flat program's inputs.

    Args:
        axes: by name of the input in the ONNX file.
        names: of the inputs, in order.

    Raises:
        CaptureError: torch fixed one of them.
    """
    users = set(program.graph_signature.user_inputs)
    holders = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in users]
    tensors = [n.meta["val"] for n in holders if isinstance(n.meta.get("val"), Tensor)]
    found = {}
    for name, value in zip(names, tensors, strict=True):
        for axis, called in axes.get(name, {}).items():
            if not isinstance(value.shape[axis], torch.SymInt):
                raise CaptureError(
                    f"dimension {axis} of '{name}' cannot be open in this model",
                    found=f"always {value.shape[axis]}",
                    remedy="dynamic={INPUT: {DIMENSION: NAME}} with the others, or dynamic=False",
                )
            found.setdefault(str(value.shape[axis].node.expr), called)
    return found
