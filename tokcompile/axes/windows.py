"""Axis rules of operators that make other rows and columns: windows side by side, and grids of another size."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes.atoms import divide, fresh, product, resolve
from tokcompile.axes.context import Context, Dims, arg, shape

aten = torch.ops.aten


def windows(ctx: Context, node: Node) -> Dims:
    """avg_pool2d and im2col: windows side by side that cover rows and columns, each a value of its own."""
    dims, sizes = list(ctx.of(node.args[0])), shape(node)
    unfolds = node.target is aten.im2col.default
    sides = _pair(node.args[1])
    counts = [divide(product(resolve(dim)), side) for dim, side in zip(dims[-2:], sides, strict=True)]
    if None in counts or not _side_by_side(node, sides, unfolds):
        return [fresh(size) for size in sizes] if unfolds else [*dims[:-2], *(fresh(size) for size in sizes[-2:])]
    outer, inner = [], []
    for dim, count, side in zip(dims[-2:], counts, sides, strict=True):
        outer.append(fresh(count))
        inner.append(fresh(side))
        ctx.unify(node, dim, (*outer[-1], *inner[-1]))
    if not unfolds:
        return [*dims[:-2], *outer]
    return [*dims[:-3], (*dims[-3], *inner[0], *inner[1]), (*outer[0], *outer[1])]


def resampled(ctx: Context, node: Node) -> Dims:
    """Interpolation and adaptive pools of [B, C, H, W]: rows and columns anew, each image and channel by itself."""
    return [*ctx.of(node.args[0])[:-2], *(fresh(size) for size in shape(node)[-2:])]


def _side_by_side(node: Node, sides: list[int], unfolds: bool) -> bool:
    """Whether windows neither overlap nor leave anything out."""
    steps = _pair(arg(node, 4 if unfolds else 2, "stride") or sides)
    dilated = unfolds and _pair(arg(node, 2, "dilation")) != [1, 1]
    return steps == sides and not any(_pair(arg(node, 3, "padding") or 0)) and not dilated


def _pair(sides: Any) -> list[int]:
    sides = [sides] if isinstance(sides, int) else list(sides)
    return sides * 2 if len(sides) == 1 else sides
