"""Super token attention on the models of the fleet, with the released code's convolution-like unfold and fold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fleet
import naive
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rulecases import RuleCase

Cell = tuple[int, int]


def sampled(x: Tensor, side: int, cell: Cell, iterations: int = 1) -> tuple[Tensor, Tensor]:
    """Super tokens [B, m, C] and affinity [B, m, hw, 9] of patches [B, side * side, C]."""
    batch, _, channels = x.shape
    (high, wide), (rows, columns) = cell, grid(side, cell)
    plane = x.float().transpose(1, 2).reshape(batch, channels, side, side)
    plane = F.pad(plane, (0, columns * wide - side, 0, rows * high - side))
    pixels = plane.reshape(batch, channels, rows, high, columns, wide).permute(0, 2, 4, 3, 5, 1)
    pixels = pixels.reshape(batch, rows * columns, high * wide, channels)
    centres = F.adaptive_avg_pool2d(plane, (rows, columns))
    for _ in range(iterations):
        around = F.unfold(centres, 3, padding=1).reshape(batch, channels, 9, rows * columns).permute(0, 3, 1, 2)
        affinity = (pixels @ around * channels**-0.5).softmax(-1)
        mass = F.fold(affinity.sum(2).transpose(1, 2), (rows, columns), 3, padding=1)
        total = (pixels.transpose(2, 3) @ affinity).permute(0, 2, 3, 1).reshape(batch * channels, 9, rows * columns)
        total = F.fold(total, (rows, columns), 3, padding=1).reshape(batch, channels, rows, columns)
        centres = total / (mass + 1e-12)
    return centres.flatten(2).transpose(1, 2).to(x.dtype), affinity


def grid(side: int, cell: Cell) -> tuple[int, int]:
    """Rows and columns of super tokens."""
    return -(-side // cell[0]), -(-side // cell[1])


def spread(s: Tensor, affinity: Tensor, side: int, cell: Cell) -> Tensor:
    """Patches [B, side * side, C] of super tokens [B, m, C]."""
    batch, count, channels = s.shape
    (high, wide), (rows, columns) = cell, grid(side, cell)
    plane = s.float().transpose(1, 2).reshape(batch, channels, rows, columns)
    around = F.unfold(plane, 3, padding=1).reshape(batch, channels, 9, count).permute(0, 3, 1, 2)
    out = (around @ affinity.transpose(2, 3)).reshape(batch, rows, columns, channels, high, wide)
    out = out.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * high, columns * wide)
    return out[:, :, :side, :side].flatten(2).transpose(1, 2).to(s.dtype)


@contextmanager
def wrapped(
    attentions: Sequence[nn.Module], side: int, cell: Cell, leading: int, iterations: int = 1
) -> Iterator[None]:
    """Let attention modules, which read normed tokens, run on super tokens; leading tokens are not pooled."""
    hooks = []
    for module in attentions:
        held: dict[str, Tensor] = {}

        def pool(module, args, kwargs, held=held):
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            tokens, held["affinity"] = sampled(x[:, leading:], side, cell, iterations)
            x = torch.cat([x[:, :leading], tokens], 1)
            return ((), {**kwargs, "hidden_states": x}) if "hidden_states" in kwargs else ((x, *args[1:]), kwargs)

        def unpool(module, args, kwargs, out, held=held):
            x = out[0] if isinstance(out, tuple) else out
            back = torch.cat([x[:, :leading], spread(x[:, leading:], held["affinity"], side, cell)], 1)
            return (back, *out[1:]) if isinstance(out, tuple) else back

        hooks += [
            module.register_forward_pre_hook(pool, with_kwargs=True),
            module.register_forward_hook(unpool, with_kwargs=True),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def asked(keep: Any) -> int:
    """The side of a cell for what the matrix calls a budget: 1 for everything, the whole grid for one."""
    return 1 if keep == 1.0 and isinstance(keep, float) else 4 if keep == 1 else 2 if isinstance(keep, str) else 3


BLOCKS = 2


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    config, leading = model.config.vision_config, naive.class_tokens(model)
    side, cell = config.image_size // config.patch_size, asked(keep)
    live = config.num_hidden_layers + 1 + model.config.vision_feature_layer
    layers = list(naive._layers(model))[: min(BLOCKS, live)]
    with wrapped([layer.self_attn for layer in layers], side, (cell, cell), leading):
        return naive.run(model, inputs)


CASE = RuleCase(
    models=fleet.VLMS,
    options=lambda model, keep: {"cell": asked(keep), "blocks": BLOCKS},
    run=run,
    tolerance=1e-5,
    coarse=0.1,
    drops=False,
    chooses=False,
)
