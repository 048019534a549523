"""A value that is split and joined again is the value itself.

Models that take several images hand their features out image by image and join them again. The sizes are read from an
input, so they are known only at run time, and with them the number of image tokens of a prompt whose length is known.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
_SPLITS = (aten.split_with_sizes.default, aten.split.Tensor)


def rejoin(graph: Graph, cat: Node) -> bool:
    """Replace the concatenation of all parts of a value, in order, by the value; False where it is none.

    Parts whose rows were flattened before they are joined are the value with its rows flattened.
    """
    parts, dim = cat.args[0], cat.args[1] if len(cat.args) > 1 else 0
    flat = bool(parts) and all(isinstance(p, Node) and _flattens(p) for p in parts)
    found = [p.args[0] for p in parts] if flat else list(parts)
    if not found or not all(isinstance(p, Node) and p.target is operator.getitem for p in found):
        return False
    split = found[0].args[0]
    if split.target not in _SPLITS or any(p.args != (split, i) for i, p in enumerate(found)):
        return False
    value, along = split.args[0], split.args[2] if len(split.args) > 2 else 0
    rank = value.meta["val"].ndim
    if len(found) != len(split.meta["val"]) or (along - dim) % rank or (flat and along % rank):
        return False
    if flat:
        with graph.inserting_before(cat):
            value = graph.call_function(aten.flatten.using_ints, (value, 0, 1))
        value.meta = {**cat.meta, "val": value.args[0].meta["val"].flatten(0, 1)}
    cat.replace_all_uses_with(value)
    graph.erase_node(cat)
    _measure_again(value)
    return True


def _flattens(node: Node) -> bool:
    """Whether a node makes one dimension of the first two of its input, and leaves the others."""
    if node.target not in (aten.reshape.default, aten.view.default):
        return False
    before, after = node.args[0].meta["val"].shape, node.args[1]
    return len(after) == len(before) - 1 and after[0] == -1 and list(after[1:]) == list(before[2:])


def _measure_again(value: Node) -> None:
    """Give what is computed from a value the shape that it has now that the value's own is known."""
    todo = list(value.users)
    while todo:
        node = todo.pop()
        old = node.meta.get("val")
        if node.op != "call_function" or not _unknown(old):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)
        todo += node.users


def _unknown(old: Any) -> bool:
    """Whether a size depends on the values of an input."""
    sizes = old.shape if isinstance(old, torch.Tensor) else [old]
    return any(isinstance(s, torch.SymInt) and _unbacked(s) for s in sizes)


def _unbacked(size: torch.SymInt) -> bool:
    return not size.node.has_hint() or any(str(s).startswith("u") for s in size.node.expr.free_symbols)
