"""Repair of what an edit leaves stale in an operator: shape literals, and the fake value of its result."""

from __future__ import annotations

from functools import reduce
from operator import mul
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.axes.views import SPLITS
from tokcompile.editing.edit import Length, length_value
from tokcompile.errors import EditError
from tokcompile.program import place

if TYPE_CHECKING:
    from tokcompile.editing.tokenmap import TokenMap
    from tokcompile.editing.transport import Transport

aten = torch.ops.aten
_SHAPE_AT = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.broadcast_to.default: 1,
}


def contains(dim: Dim, axis: Dim) -> bool:
    """Whether the atoms of an axis stand side by side in a dimension."""
    width = len(axis)
    return width > 0 and any(dim[i : i + width] == axis for i in range(len(dim) - width + 1))


def repair(transport: Transport, node: Node, token_map: TokenMap) -> None:
    """Give an operator the sizes of the new axis. One that only checks its input, and makes no value, has none."""
    if node not in transport.axes.context.dims:
        return
    args = repaired_args(transport, node, token_map)
    if args != list(node.args):
        transport.editor.set_args(node, args)
    node.meta["val"] = _new_value(transport, node, token_map)


def repaired_args(transport: Transport, node: Node, token_map: TokenMap) -> list[Any]:
    """Arguments of an operator with its shape literals on the new axis."""
    args = list(node.args)
    if node.target in _SHAPE_AT:
        spot = _SHAPE_AT[node.target]
        args[spot] = _repaired_sizes(transport, node, list(args[spot]), token_map)
    elif node.target is aten.unflatten.int:
        start = args[1] % len(transport.of(args[0]))
        dims = transport.of(node)[start : start + len(args[2])]
        args[2] = _sizes_for(transport, node, dims, list(args[2]), token_map)
    elif node.target in SPLITS and _splits_rows(transport, node, token_map):
        args[1] = [token_map.new for _ in args[1]] if isinstance(args[1], (list, tuple)) else token_map.new
    _check_whole(transport, node, token_map)
    return args


def _repaired_sizes(transport: Transport, node: Node, sizes: list[Any], token_map: TokenMap) -> list[Any]:
    return _sizes_for(transport, node, transport.of(node), sizes, token_map)


def _sizes_for(transport: Transport, node: Node, dims: list[Dim], sizes: list[Any], token_map: TokenMap) -> list[Any]:
    axis = resolve(token_map.axis)
    return [
        flat_size(transport, node, dim, token_map) if transport.counts(dim, axis) and size != -1 else size
        for dim, size in zip(dims, sizes, strict=True)
    ]


def flat_size(transport: Transport, node: Node, dim: Dim, token_map: TokenMap) -> Length:
    """Size, after the edit, of a dimension that may hold other factors beside the tokens."""
    axis = resolve(token_map.axis)
    others = tuple(a for a in dim if a not in axis)
    named = tuple(a for a in others if not isinstance(a.size, int))
    factor = product(tuple(a for a in others if isinstance(a.size, int)))
    lengths: list[Length] = [token_map.new if axis[0] in dim else 1, factor]
    if named and named == resolve(token_map.rows):
        lengths.append(transport.editor.size(token_map.source, 0))
    elif named:
        raise EditError(
            "a shape mixes the token axis with a symbolic size that an edit cannot name",
            where=[place(node)],
            found=f"dimension {dim}",
        )
    with transport.editor.before(node):
        return transport.editor.arithmetic(lambda *sizes: reduce(mul, sizes), *lengths)


def _splits_rows(transport: Transport, node: Node, token_map: TokenMap) -> bool:
    """Whether a split takes flattened rows apart into one piece of tokens each; one row is a piece itself."""
    where = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dim = transport.of(node.args[0])[where]
    axis = resolve(token_map.axis)
    return contains(dim, axis) and (dim != axis or len(node.meta["val"]) == 1)


def _check_whole(transport: Transport, node: Node, token_map: TokenMap) -> None:
    """Refuse an operator that takes the token axis apart, as a view to the patch grid does."""
    if takes_apart(transport, node, token_map) and not token_map.thin:
        raise EditError(
            "the model takes the token axis apart after the place of the edit",
            where=[place(node)],
            found=f"the grid of {' x '.join(str(a.size) for a in resolve(token_map.axis))} patches",
            remedy="edit further down, where tokens are a plain sequence",
        )


def takes_apart(transport: Transport, node: Node, token_map: TokenMap) -> bool:
    """Whether the factors of a map's axis are apart in the result of a node."""
    axis = resolve(token_map.axis)
    if len(axis) < 2:
        return False
    return any(any(a in dim for a in axis) and not contains(dim, axis) for dim in transport.of(node))


def _new_value(transport: Transport, node: Node, token_map: TokenMap) -> Any:
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return _resized(transport, value, transport.of(node), token_map)
    lists = transport.axes.context.dims[node]
    pairs = zip(value, ([resolve(d) for d in dims] for dims in lists), strict=True)
    return type(value)(_resized(transport, v, d, token_map) if isinstance(v, torch.Tensor) else v for v, d in pairs)


def _resized(transport: Transport, value: torch.Tensor, dims: list[Dim], token_map: TokenMap) -> torch.Tensor:
    axis = resolve(token_map.axis)
    before, after = length_value(token_map.old), length_value(token_map.new)
    spots = [i for i, dim in enumerate(dims) if transport.counts(dim, axis)]
    if not spots:
        return value
    shape = list(value.shape)
    for spot in spots:
        if contains(dims[spot], axis):
            shape[spot] = shape[spot] // before * after
        else:  # rows or columns of features
            held = product(tuple(a for a in axis if a in dims[spot]))
            shape[spot] = shape[spot] // held * (after if axis[0] in dims[spot] else 1)
    strides = _dense_strides(shape, list(value.stride()))
    key = (tuple(shape), tuple(strides), value.dtype, value.device)
    if not all(isinstance(n, int) for n in (*shape, *strides)):
        return _empty(transport, *key)
    if key not in transport.values:  # the same few shapes in every layer
        transport.values[key] = _empty(transport, *key)
    return transport.values[key]


def _empty(transport: Transport, shape: Any, strides: Any, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with transport.editor.program.fake_mode:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def _dense_strides(shape: list[Any], old: list[Any]) -> list[Any]:
    """Strides of a dense tensor whose dimensions lie in memory in the same order as before; broadcast ones stay 0."""

    def rank(i: int) -> tuple[int, int]:
        return (old[i] if isinstance(old[i], int) else 2**60, -i)

    strides: list[Any] = [0] * len(shape)
    step: Any = 1
    for i in sorted(range(len(shape)), key=rank):
        if isinstance(old[i], int) and old[i] == 0:
            continue
        strides[i] = step
        step = step * shape[i]
    return strides
