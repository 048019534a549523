"""Gather one dimension of a value by a token map, whatever else that dimension counts."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.editing.edit import Editor
from tokcompile.editing.tokenmap import TokenMap
from tokcompile.errors import EditError
from tokcompile.program import place

aten = torch.ops.aten
tokred = torch.ops.tokred


def gather_dim(editor: Editor, value: Node, token_map: TokenMap, spot: int, dims: list[Dim]) -> tuple[Node, int, int]:
    """Gather one dimension of a value by the map.

    Returns:
        The new value, and its token and batch dimensions. A value without a batch dimension gets one in front,
        unless the batch is one row.
    """
    if dims[spot] != resolve(token_map.axis):
        return gather_flat(editor, value, token_map, spot, dims), spot, spot
    batch = _batch(value, dims, spot, token_map)
    if batch >= 0:
        return editor.call(tokred.gather_tokens.default, value, token_map.source, spot, batch), spot, batch
    wide = editor.call(aten.unsqueeze.default, value, 0)
    moved = editor.call(tokred.gather_tokens.default, wide, token_map.source, spot + 1, 0)
    if token_map.rows:
        return moved, spot + 1, 0
    return editor.call(aten.squeeze.dim, moved, 0), spot, 0


def _batch(value: Node, dims: list[Dim], spot: int, token_map: TokenMap) -> int:
    rows = resolve(token_map.rows)
    for position, dim in enumerate(dims):
        if rows and dim == rows:
            return position
    free = [i for i, dim in enumerate(dims) if not dim and i != spot]
    if free and free[0] == 0:
        return 0
    if dims[0] and spot != 0:
        raise EditError(
            "a value cannot be gathered row by row",
            where=[place(value)],
            found=f"{tuple(value.meta['val'].shape)} has no batch dimension in front of its tokens",
        )
    return -1


def gather_flat(editor: Editor, value: Node, token_map: TokenMap, spot: int, dims: list[Dim]) -> Node:
    """Gather a dimension that flattens batch rows and tokens together, or tokens and the parts of each."""
    apart = rows_apart(dims, spot, token_map)
    if apart is not None:
        return _gather_apart(editor, value, token_map, spot, dims, apart)
    axis, rows = resolve(token_map.axis), resolve(token_map.rows)
    batch = next((i for i, dim in enumerate(dims) if rows and dim == rows), -1)
    lead = rows if batch < 0 else ()
    width = len(lead) + len(axis)
    parts = product(dims[spot][width:])
    if dims[spot][:width] != (*lead, *axis) or not isinstance(parts, int):
        raise EditError(
            "the token axis is flattened with another in a way that an edit cannot follow",
            where=[place(value)],
            found=f"dimension {spot} of {tuple(value.meta['val'].shape)}",
        )
    shape: list[Any] = [editor.size(value, i) for i in range(value.meta["val"].ndim)]
    inner = [parts] if len(dims[spot]) > width else []
    outer = [-1] if batch < 0 else []
    sizes = [*shape[:spot], *outer, token_map.old, *inner, *shape[spot + 1 :]]
    apart = editor.call(aten.reshape.default, value, sizes)
    where = spot + len(outer)
    at = spot if batch < 0 else batch + (batch > spot) * len(inner)
    picked = editor.call(tokred.gather_tokens.default, apart, token_map.source, where, at)
    return editor.call(aten.flatten.using_ints, picked, spot, where + len(inner))


def rows_apart(dims: list[Dim], spot: int, token_map: TokenMap) -> int | None:
    """The dimension that holds the first factors of the rows, where the others stand before the tokens of each."""
    axis, rows = resolve(token_map.axis), resolve(token_map.rows)
    for count in range(1, len(rows)):
        if dims[spot] == (*rows[count:], *axis) and rows[:count] in dims[:spot]:
            return dims.index(rows[:count])
    return None


def _gather_apart(editor: Editor, value: Node, token_map: TokenMap, spot: int, dims: list[Dim], batch: int) -> Node:
    """Gather tokens whose rows are in two dimensions: together for a while, and then as they were."""
    call = editor.call
    inner = product(dims[spot][: -len(resolve(token_map.axis))])
    there = list(range(len(dims) + 1))
    there.insert(batch + 1, there.pop(spot))
    back = list(range(len(dims) + 1))
    back.insert(spot, back.pop(batch + 1))
    wide = call(aten.unflatten.int, value, spot, [inner, token_map.old])
    wide = call(aten.flatten.using_ints, call(aten.permute.default, wide, there), batch, batch + 1)
    moved = call(tokred.gather_tokens.default, wide, token_map.source, spot, batch)
    moved = call(aten.permute.default, call(aten.unflatten.int, moved, batch, [-1, inner]), back)
    return call(aten.flatten.using_ints, moved, spot, spot + 1)
