"""Axis rules of operators that only arrange: views, transposes, slices, concatenations, splits."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes.atoms import Atom, Dim, fresh, product, regroup, resolve, same, size_of
from tokcompile.axes.context import MAX, Context, Dims, arg, is_empty, shape, wrap

aten = torch.ops.aten
SPLITS = {aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default}


def view(ctx: Context, node: Node) -> Dims:
    """view, reshape, flatten, unflatten: the same atoms, grouped anew."""
    return regroup(ctx.of(node.args[0]), shape(node))


def transpose(ctx: Context, node: Node) -> Dims:
    """Swap two dimensions."""
    dims = list(ctx.of(node.args[0]))
    if node.target in (aten.t.default, aten.numpy_T.default, aten.mT.default):
        one, two = (-2, -1) if len(dims) > 1 else (0, 0)
    else:
        one, two = node.args[1], node.args[2]
    dims[one], dims[two] = dims[two], dims[one]
    return dims


def permute(ctx: Context, node: Node) -> Dims:
    """Reorder dimensions."""
    dims = ctx.of(node.args[0])
    return [dims[i] for i in node.args[1]]


def unsqueeze(ctx: Context, node: Node) -> Dims:
    """Insert a dimension of size 1."""
    dims = list(ctx.of(node.args[0]))
    dims.insert(wrap(node.args[1], len(dims) + 1), ())
    return dims


def squeeze(ctx: Context, node: Node) -> Dims:
    """Remove dimensions of size 1."""
    dims = ctx.of(node.args[0])
    which = arg(node, 1, "dim")
    rank = len(dims)
    chosen = range(rank) if which is None else [wrap(d, rank) for d in ([which] if isinstance(which, int) else which)]
    return [dim for i, dim in enumerate(dims) if not (i in chosen and same(product(dim), 1))]


def select(ctx: Context, node: Node) -> Dims:
    """Take one index of a dimension."""
    dims = list(ctx.of(node.args[0]))
    del dims[node.args[1]]
    return dims


def slice_(ctx: Context, node: Node) -> Dims:
    """Take a range of a dimension: a whole segment of a concatenation is known by its own atom."""
    dims = list(ctx.of(node.args[0]))
    where = wrap(arg(node, 1, "dim", 0), len(dims))
    start, end, step = (_bound(arg(node, i, name)) for i, name in ((2, "start"), (3, "end"), (4, "step")))
    dims[where] = sub_range(dims[where], start, end, 1 if step is None else step, shape(node)[where])
    return dims


def _bound(value: Any) -> Any:
    """A bound of a range as an int or expression; None for an open one."""
    value = value.meta["val"] if isinstance(value, Node) else value
    return None if value is None else size_of(value)


def sub_range(dim: Dim, start: Any, end: Any, step: Any, size: Any) -> Dim:
    """Dimension of `[start:end:step]` of a dimension, given the size of the result."""
    dim = resolve(dim)
    if same(product(dim), size):
        return dim
    if len(dim) != 1 or step != 1 or not isinstance(start or 0, int):
        return fresh(size)
    atom, start = dim[0], start or 0
    end = None if end is None or (isinstance(end, int) and end >= MAX) else end
    end = product(dim) + end if isinstance(end, int) and end < 0 else end
    segment = _segment(atom, start, end)
    if segment is not None:
        return segment
    key = (start, end if isinstance(end, int) or end is None else str(end))
    if key not in atom.slices:
        made = fresh(size)
        if not made:
            return ()
        atom.slices[key] = made[0]
    return (atom.slices[key],)


def _segment(atom: Atom, start: int, end: Any) -> Dim | None:
    if atom.segments is None:
        return None
    sizes = [product(s) for s in atom.segments]
    offset = 0
    for index, size in enumerate(sizes):
        if not isinstance(offset, int):
            return None
        last = index == len(sizes) - 1
        if offset == start and ((end is None and last) or (end is not None and same(offset + size, end))):
            return resolve(atom.segments[index])
        offset = offset + size
    return None


def cat(ctx: Context, node: Node) -> Dims:
    """Concatenate: other dimensions align; the joined one remembers its segments."""
    values = [v for v in node.args[0] if not is_empty(v)]
    where = wrap(arg(node, 1, "dim", 0), len(ctx.of(values[0])))
    out = list(ctx.of(values[0]))
    for value in values[1:]:
        for position, dim in enumerate(ctx.of(value)):
            if position != where:
                ctx.unify(node, out[position], dim)
                out[position] = out[position] or dim
    if len(values) > 1:
        out[where] = _joined([ctx.of(v)[where] for v in values], shape(node)[where], _pieces_of(ctx, values))
    return out


def _joined(dims: list[Dim], size: Any, split: Dim) -> Dim:
    first = resolve(dims[0])
    if first and all(resolve(d) == first for d in dims):  # n pieces with the same axis: an outer count and that axis
        return (*(split or fresh(len(dims))), *first)
    made = fresh(size)
    if made:
        made[0].segments = tuple(dims)
    return made


def _pieces_of(ctx: Context, values: list[Node]) -> Dim:
    """What a dimension was split by, where values are made of all pieces of one split, each of its own; else `()`."""
    found = [_piece(value) for value in values]
    split = found[0].args[0] if found[0] is not None else None
    pieces = [(piece.args[0], piece.args[1]) if piece is not None else None for piece in found]
    if split is None or split.target not in SPLITS or pieces != [(split, i) for i in range(len(split.meta["val"]))]:
        return ()
    where = wrap(arg(split, 2, "dim", 0), len(ctx.of(split.args[0])))
    whole = resolve(ctx.of(split.args[0])[where])
    sizes = {size_of(piece.shape[where]) for piece in split.meta["val"]}
    return whole[:1] if len(whole) > 1 and sizes == {product(whole[1:])} and whole[0].size == len(values) else ()


def _piece(value: Node) -> Node | None:
    """The piece of a split that a value is made of alone."""
    while value.target is not operator.getitem:
        if len(value.all_input_nodes) != 1:
            return None
        value = value.all_input_nodes[0]
    return value


def stack(ctx: Context, node: Node) -> Dims:
    """Stack along a new dimension."""
    values = list(node.args[0])
    dims = list(ctx.of(values[0]))
    for value in values[1:]:
        for one, other in zip(dims, ctx.of(value), strict=True):
            ctx.unify(node, one, other)
    dims.insert(wrap(arg(node, 1, "dim", 0), len(dims) + 1), fresh(len(values)))
    return dims


def pieces(ctx: Context, node: Node) -> list[Dims]:
    """split, chunk and unbind: one list of dimensions per result."""
    dims = ctx.of(node.args[0])
    unbind = node.target is aten.unbind.int
    where = wrap(arg(node, 1 if unbind else 2, "dim", 0), len(dims))
    if unbind:
        return [[*dims[:where], *dims[where + 1 :]] for _ in node.meta["val"]]
    out, offset = [], 0
    whole = resolve(dims[where])
    for value in node.meta["val"]:
        size = size_of(value.shape[where])
        inner = whole[1:] if len(whole) > 1 and same(product(whole[1:]), size) else None
        piece = inner or sub_range(whole, offset, offset + size, 1, size)
        out.append([*dims[:where], piece, *dims[where + 1 :]])
        offset = offset + size
    return out


def expand(ctx: Context, node: Node) -> Dims:
    """Broadcast dimensions of size 1 to given sizes."""
    sizes = shape(node)
    dims = ctx.of(node.args[0])
    dims = [()] * (len(sizes) - len(dims)) + list(dims)
    return [dim or fresh(size) for dim, size in zip(dims, sizes, strict=True)]
