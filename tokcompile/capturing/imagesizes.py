"""What a model computes in Python from the sizes of its images, computed before the graph and given to it as inputs.

Models that take images of any size read their sizes as numbers: to split a sequence of patches by image, to count
positions in three rows, to order patches by windows. No graph can hold that. transformers takes each of these values
as an input too (`image_cu_seqlens`, `position_ids`...), and its exporters compute them with the functions used here.
Attention to patches of the same image only, which is a loop over images otherwise, becomes one attention with a mask
over all patches, through transformers' own registry.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "tokred_flash_packed"
"""Name in transformers' registry; one with "flash" in it is given the bounds of the images instead of their pieces."""
_GRIDS = {"image_": "image_grid_thw", "video_": "video_grid_thw"}
_NUMBERS = ("image_sizes", "batch_num_images")
"""Inputs that models read as numbers alone."""
_BEFORE = "_tokcompile_packed_before"


def precompute(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs with all that a model would work out in Python from grids and sizes of images.

    - `image_grid_thw` and `video_grid_thw`: bounds, positions, windows and interpolation of the patches, int64 or float
      tensors with as many rows as there are patches or windows, named `image_...` and `video_...`;
    - `position_ids` of a prompt, int64 [3, B, T], where the model counts in time, height and width;
    - `image_sizes` and `batch_num_images` as Python numbers, part of the graph: new sizes are a new graph.

    Inputs of other models are returned as they are.

    Args:
        model: any model. One of transformers that counts positions notes, as in its own forward, where a prompt ended.
        inputs: keyword arguments of its forward.
    """
    inputs = dict(inputs)
    for name in _NUMBERS:
        if isinstance(inputs.get(name), Tensor):
            inputs[name] = _numbers(inputs[name].tolist())
    tower = packed_tower(model)
    given = {prefix: inputs[name] for prefix, name in _GRIDS.items() if inputs.get(name) is not None}
    if tower is None or not given:
        return inputs
    if inputs.get("position_ids") is None and not _continues(inputs):
        positions = _positions(model, inputs)
        if positions is not None:
            inputs["position_ids"] = positions
    for prefix, grid in given.items():
        inputs |= {prefix + name: value for name, value in _of_grid(tower, grid).items() if prefix + name not in inputs}
    return inputs


def packed_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower whose input is one sequence of patches with a grid for each image; None without one."""
    return next((m for m in _transformers(model) if "grid_thw" in inspect.signature(m.forward).parameters), None)


def reads_sizes(model: nn.Module) -> bool:
    """Whether `precompute` has anything to do for a model."""
    numbers = set(_NUMBERS) & {*inspect.signature(model.forward).parameters}
    return bool(numbers) or packed_tower(model) is not None


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """`install` for a while."""
    there = _BEFORE in model.__dict__
    install(model)
    try:
        yield
    finally:
        if not there:
            restore(model)


def install(model: nn.Module) -> None:
    """Let a tower of packed patches attend under a mask; nothing happens to a model without one, or a second time."""
    tower = packed_tower(model)
    if tower is None or tower.config._attn_implementation not in ("sdpa", "eager"):
        return
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, _attend)
    setattr(model, _BEFORE, tower.config._attn_implementation)
    tower.config._attn_implementation_internal = PACKED


def restore(model: nn.Module) -> None:
    """Take back what `install` did."""
    before = model.__dict__.pop(_BEFORE, None)
    tower = packed_tower(model)
    if before is not None and tower is not None:
        tower.config._attn_implementation_internal = before


def _transformers(model: nn.Module) -> Iterator[Any]:
    """Modules with a configuration, from the outermost on."""
    return (m for m in model.modules() if hasattr(m, "config"))


def _numbers(value: Any) -> Any:
    return tuple(map(_numbers, value)) if isinstance(value, list) else value


def _continues(inputs: Mapping[str, Any]) -> bool:
    cache = inputs.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


@torch.no_grad()
def _of_grid(tower: nn.Module, grid: Tensor) -> dict[str, Tensor]:
    from transformers.exporters.utils import precompute_export_inputs

    found: dict[str, Any] = {"grid_thw": grid}
    precompute_export_inputs(tower, found)
    return {name: value for name, value in found.items() if name != "grid_thw" and isinstance(value, Tensor)}


@torch.no_grad()
def _positions(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Positions as the model counts them; it keeps what it needs to go on from there."""
    owner = next((m for m in _transformers(model) if hasattr(m, "compute_3d_position_ids")), None)
    ids = inputs.get("input_ids")
    if owner is None or ids is None:
        return None
    known = {name: inputs.get(name) for name in inspect.signature(owner.compute_3d_position_ids).parameters}
    known["inputs_embeds"] = torch.empty(*ids.shape, 0, device=ids.device)  # read for its shape
    return owner.compute_3d_position_ids(**known)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention within each image: query [1, H, N, D], bounds [images + 1], result [1, N, H, D] and no weights."""
    del module, attention_mask, kwargs
    mask = None
    if cu_seq_lens_q is not None:
        patches = torch.arange(query.shape[2], device=query.device)
        image = (patches[:, None] >= cu_seq_lens_q[None, 1:-1]).sum(1)
        mask = (image[:, None] == image[None])[None, None]
    groups = query.shape[1] != key.shape[1]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=groups
    )
    return out.transpose(1, 2).contiguous(), None
