"""Rows under a mask that are increased in place, written as the sum that they are.

Features of deep vision layers are added to the image tokens of early text layers so:
`h = h.clone(); h[mask] = h[mask] + features`. How many rows a mask picks is known only at run time, and a token axis
ends there. The sum of `h` and the features scattered among zeros has the tokens of `h`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
PUTS = (aten.index_put_.default, aten.index_put.default)
"""Operators that assign under a mask."""


def sum_under_mask(graph: Graph, put: Node) -> bool:
    """Replace one such assignment; False, and nothing is done, where it is of another kind.

    The zeros are negative: added to a number, they leave its sign as it is even where it is a zero itself.
    """
    found = _parts(graph, put)
    if found is None:
        return False
    base, mask, rows, features = found
    value = base.args[0] if base.target is aten.clone.default else base
    with graph.inserting_before(put):
        wide = _call(graph, put, aten.unsqueeze.default, (mask, -1), mask.meta["val"].unsqueeze(-1))
        # Sized by the mask: the value may be shortened later, and these go with the mask and the features.
        sizes = [_size(graph, put, mask, dim) for dim in range(mask.meta["val"].ndim)]
        sizes.append(features.meta["val"].shape[1])
        zeros = _call(graph, put, aten.new_full.default, (features, sizes, -0.0), value.meta["val"])
        placed = _call(graph, put, aten.masked_scatter.default, (zeros, wide, features), value.meta["val"])
        total = _call(graph, put, aten.add.Tensor, (value, placed), value.meta["val"])
    _count_features(graph, rows, features)
    added = put.args[2]
    put.replace_all_uses_with(total)
    if put.target is aten.index_put_.default:
        base.replace_all_uses_with(total, delete_user_cb=lambda user: user not in (rows, put))
    for node in (put, added, rows):
        graph.erase_node(node)
    return True


def _parts(graph: Graph, put: Node) -> tuple[Node, Node, Node, Node] | None:
    """The value, the mask, the rows under it and what is added to them."""
    base, places, added, *accumulate = put.args
    if any(accumulate) or len(places) != 1 or not isinstance(added, Node) or added.target is not aten.add.Tensor:
        return None
    (mask,) = places
    if mask.meta["val"].dtype != torch.bool or mask.meta["val"].ndim != base.meta["val"].ndim - 1 or added.kwargs:
        return None
    rows = next((a for a in added.args if isinstance(a, Node) and _picks(a, base, mask)), None)
    if rows is None or list(added.users) != [put]:
        return None
    features = next(a for a in added.args if a is not rows)
    if not isinstance(features, Node) or features.meta["val"].ndim != 2 or not _sizes_alone(rows, added):
        return None
    if features.meta["val"].dtype != base.meta["val"].dtype or not isinstance(features.meta["val"].shape[1], int):
        return None
    if put.target is aten.index_put_.default:
        order = {n: i for i, n in enumerate(graph.nodes)}
        early = [u for u in base.users if u not in (rows, put) and order[u] < order[put]]
        if base.target is not aten.clone.default or early:
            return None
    return base, mask, rows, features


def _picks(node: Node, base: Node, mask: Node) -> bool:
    return node.target is aten.index.Tensor and node.args[0] is base and list(node.args[1]) == [mask]


def _sizes_alone(rows: Node, added: Node) -> bool:
    return all(u is added or u.target is aten.sym_size.int for u in rows.users)


def _count_features(graph: Graph, rows: Node, features: Node) -> None:
    """Let checks of how many rows there are count the features, of which there are as many."""
    for size in [u for u in rows.users if u.target is aten.sym_size.int]:
        size.args = (features, size.args[1])
        size.meta["val"] = features.meta["val"].shape[size.args[1]]


def _size(graph: Graph, like: Node, value: Node, dim: int) -> Any:
    size = value.meta["val"].shape[dim]
    return size if isinstance(size, int) else _call(graph, like, aten.sym_size.int, (value, dim), size)


def _call(graph: Graph, like: Node, target: object, args: tuple[object, ...], value: object) -> Node:
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": value}
    return node
