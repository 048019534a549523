"""Axis rules of operators that put elements in another order, and of those that undo it."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from tokcompile.axes.atoms import fresh, product, resolve, same, size_of
from tokcompile.axes.context import Context, Dims, arg, wrap

aten = torch.ops.aten
SORTS = {aten.sort.default, aten.sort.stable}


def ordered(ctx: Context, node: Node) -> list[Dims]:
    """sort: values and old indices in a new order, which is an axis of its own."""
    dims = list(ctx.of(node.args[0]))
    named = "stable" in node.target._overloadname
    where = wrap(arg(node, 2 if named else 1, "dim", -1), len(dims))
    made = fresh(product(resolve(dims[where])))
    out = [*dims[:where], made, *dims[where + 1 :]]
    return [out, list(out)]


def numbered(ctx: Context, node: Node) -> Dims:
    """argsort: the numbers of elements in a new order, which is an axis of its own.

    Of the numbers by which another sequence was put in order they lead back to that sequence.
    """
    dims = list(ctx.of(node.args[0]))
    named = "stable" in node.target._overloadname
    where = wrap(node.kwargs.get("dim", -1) if named else arg(node, 1, "dim", -1), len(dims))
    made = fresh(product(resolve(dims[where])))
    for value in _put_in_order(node.args[0]):
        if value in ctx.dims:  # not further down
            ctx.unify(node, made, ctx.of(value)[0])
    return [*dims[:where], made, *dims[where + 1 :]]


def _put_in_order(numbers: Node) -> list[Node]:
    """The values of as many elements as there are numbers [n] that are put in the order of these."""
    if numbers.meta["val"].ndim != 1:
        return []
    length = size_of(numbers.meta["val"].shape[0])
    users = [u for u in numbers.users if u.target is aten.index.Tensor and list(u.args[1]) == [numbers]]
    return [u.args[0] for u in users if same(size_of(u.args[0].meta["val"].shape[0]), length)]


def written(ctx: Context, node: Node) -> Dims:
    """index_put: the dimensions of the target; one that undoes a sort goes back to the order before it."""
    undone = unsorted(node)
    return list(ctx.of(undone.args[0])) if undone is not None else list(ctx.of(node.args[0]))


def unsorted(node: Node) -> Node | None:
    """The sort that an index_put inverts: it writes 0, 1, 2... to the places that the sort names."""
    if node.target not in (aten.index_put_.default, aten.index_put.default) or len(node.args[1]) != 1:
        return None
    places, values = node.args[1][0], node.args[2]
    if places is None or places.target is not operator.getitem or places.args[1] != 1:
        return None
    sort = places.args[0]
    counts = values.target in (aten.arange.default, aten.arange.start) and values.meta["val"].ndim == 1
    return sort if sort.target in SORTS and counts and len(sort.meta["val"][0].shape) == 1 else None
