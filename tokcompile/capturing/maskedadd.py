"""Rows under a mask that are increased, written as the sum that they are.

Features of deep vision layers are added to the image tokens of early text layers so:
`h = h.clone(); h[mask] = h[mask] + features`; some models add an image's features to the embeddings of its tokens by
`masked_scatter(h, mask, h[mask] + features.flatten())`. How many rows a mask picks is known only at run time, and a
token axis ends there. The sum of `h` and the features scattered among zeros has the tokens of `h`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten
PUTS = (aten.index_put_.default, aten.index_put.default, aten.masked_scatter.default)
"""Operators that assign under a mask."""


@dataclass(frozen=True)
class _Sum:
    """What an assignment adds.

    Attributes:
        value: what is increased, [..., C].
        mask: bool, one value a row, or as many as `value` has.
        rows: `value[mask]`.
        added: `rows` plus the features.
        features: [n, C], a row for each row under the mask.
    """

    value: Node
    mask: Node
    rows: Node
    added: Node
    features: Node


def sum_under_mask(graph: Graph, put: Node) -> bool:
    """Replace one such assignment; False, and nothing is done, where it is of another kind.

    The zeros are negative: added to a number, they leave its sign as it is even where it is a zero itself.
    """
    found = _scattered(put) if put.target is aten.masked_scatter.default else _assigned(graph, put)
    if found is None:
        return False
    kept, width = found.value.meta["val"], found.features.meta["val"].shape[1]
    with graph.inserting_before(put):
        wide = found.mask
        if wide.meta["val"].ndim < kept.ndim:
            wide = _call(graph, put, aten.unsqueeze.default, (wide, -1), wide.meta["val"].unsqueeze(-1))
        # Sized by the mask: the value may be shortened later, and these go with the mask and the features.
        sizes = [*(_size(graph, put, found.mask, dim) for dim in range(kept.ndim - 1)), width]
        zeros = _call(graph, put, aten.new_full.default, (found.features, sizes, -0.0), kept)
        placed = _call(graph, put, aten.masked_scatter.default, (zeros, wide, found.features), kept)
        total = _call(graph, put, aten.add.Tensor, (found.value, placed), kept)
    _count_features(found.rows, found.features)
    put.replace_all_uses_with(total)
    if put.target is aten.index_put_.default:
        put.args[0].replace_all_uses_with(total, delete_user_cb=lambda user: user not in (found.rows, put))
    for node in (put, found.added, found.rows):
        graph.erase_node(node)
    return True


def _assigned(graph: Graph, put: Node) -> _Sum | None:
    """`h[mask] = h[mask] + features`."""
    base, places, added, *accumulate = put.args
    if any(accumulate) or len(places) != 1 or places[0] is None:
        return None
    found = _added(put, base, places[0], added)
    if found is None or places[0].meta["val"].ndim != base.meta["val"].ndim - 1:
        return None
    if put.target is aten.index_put_.default:
        order = {n: i for i, n in enumerate(graph.nodes)}
        early = [u for u in base.users if u not in (found.rows, put) and order[u] < order[put]]
        if base.target is not aten.clone.default or early:
            return None
        return _Sum(base.args[0], found.mask, found.rows, found.added, found.features)
    return found


def _scattered(put: Node) -> _Sum | None:
    """`masked_scatter(h, mask, h[mask] + features.flatten())`."""
    base, mask, added = put.args
    if mask.meta["val"].ndim != base.meta["val"].ndim:
        return None
    return _added(put, base, mask, added)


def _added(put: Node, base: Node, mask: Node, added: Any) -> _Sum | None:
    """The sum of the rows under a mask and features, which nobody else reads."""
    if not isinstance(added, Node) or added.target is not aten.add.Tensor or added.kwargs or list(added.users) != [put]:
        return None
    rows = next((a for a in added.args if isinstance(a, Node) and _picks(a, base, mask)), None)
    if rows is None or not all(u is added or u.target is aten.sym_size.int for u in rows.users):
        return None
    features = next((a for a in added.args if a is not rows), None)
    if isinstance(features, Node) and features.target in (aten.reshape.default, aten.view.default):
        features = features.args[0] if list(features.args[1]) == [-1] else features
    if not isinstance(features, Node) or features.meta["val"].ndim != 2:
        return None
    alike = features.meta["val"].dtype == base.meta["val"].dtype
    return _Sum(base, mask, rows, added, features) if alike and isinstance(_width(features), int) else None


def _width(features: Node) -> int | torch.SymInt:
    return features.meta["val"].shape[1]


def _picks(node: Node, base: Node, mask: Node) -> bool:
    by_mask = node.target is aten.index.Tensor and node.args[0] is base and list(node.args[1]) == [mask]
    return by_mask and mask.meta["val"].dtype == torch.bool


def _count_features(rows: Node, features: Node) -> None:
    """Let checks of how many rows there are count the features, of which there are as many."""
    for size in [u for u in rows.users if u.target is aten.sym_size.int]:
        whole = rows.meta["val"].ndim == 1 and features.meta["val"].ndim == 2
        size.target = aten.sym_numel.default if whole else size.target
        size.args = (features,) if whole else (features, size.args[1])
        size.meta["val"] = features.meta["val"].numel() if whole else features.meta["val"].shape[size.args[1]]


def _size(graph: Graph, like: Node, value: Node, dim: int) -> Any:
    size = value.meta["val"].shape[dim]
    return size if isinstance(size, int) else _call(graph, like, aten.sym_size.int, (value, dim), size)


def _call(graph: Graph, like: Node, target: object, args: tuple[object, ...], value: object) -> Node:
    node = graph.call_function(target, args)
    node.meta = {**like.meta, "val": value}
    return node
