"""The width of a grid that only the positions of its patches tell."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.editing.shapes import contains
from tokcompile.passes.context import Context
from tokcompile.sites.features import features

aten = torch.ops.aten


def grid_width(ctx: Context, axis: Dim) -> Node | None:
    """int64 [B]: how many features a row of each image's grid has; None where no patch has a row and a column.

    A packed sequence of images of any size has no grid among its factors, but the rotary positions of the vision stack
    are the row and the column of each patch. When the graph runs it is checked that features are in raster order, one
    image in each batch row.
    """
    positions = _positions(ctx, resolve(axis))
    if positions is None:
        return None
    call, count = ctx.editor.call, product(resolve(axis))
    patches = call(aten.reshape.default, positions, [-1, count, *_members(positions, count, ctx), 2])
    first, last = (call(reduce, patches, [2]) for reduce in (aten.amin.default, aten.amax.default))
    sides = call(aten.add.Tensor, call(aten.sub.Tensor, last, first), 1)
    places = call(aten.floor_divide.default, first, sides)
    row, column = (call(aten.select.int, places, -1, i) for i in (0, 1))
    width = call(aten.add.Tensor, call(aten.amax.default, column, [1]), 1)
    raster = call(aten.mul.Tensor, row, call(aten.unsqueeze.default, width, 1))
    raster = call(aten.add.Tensor, raster, column)
    counted = call(aten.arange.default, count, device=positions.meta["val"].device)
    message = "neighbours need the features of one image in each batch row, row by row"
    ctx.editor.require(call(aten.eq.Tensor, raster, counted), message)
    return width


def _positions(ctx: Context, axis: Dim) -> Node | None:
    made = features(ctx.program, ctx.sites)
    if made is None or not made.packed or made.axis != axis:
        return None
    for rotary in ctx.sites.rotary.get("vision", []):
        dims = ctx.program.axes.of(rotary.positions)
        pairs = [product(dim) for dim in dims[1:] if dim] == [2]
        if pairs and contains(dims[0], (*made.rows, *axis)):
            return rotary.positions
    return None


def _members(positions: Node, count: int, ctx: Context) -> list[int]:
    """Patches of one feature."""
    made = features(ctx.program, ctx.sites)
    rows = product(made.rows) if made is not None else 1
    return [product(ctx.program.axes.of(positions)[0]) // (rows * count)]
