"""Values of image tokens alone, where new tokens stand in their places: they are not theirs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tokcompile.editing.edit import Editor
from tokcompile.sites.splice import Splice

if TYPE_CHECKING:
    from tokcompile.editing.tokenmap import TokenMap

aten = torch.ops.aten
_THROUGH = {
    aten.unsqueeze.default,
    aten.expand.default,
    aten.to.dtype,
    aten.clone.default,
    aten.select.int,
    aten.slice.Tensor,
}
_OR = {aten.bitwise_or.Tensor, aten.logical_or.default, aten.__or__.Tensor}


def of_images(value: Node, splice: Splice | None) -> bool:
    """Whether a value says which tokens are of images, or holds features of those that are added to the stream.

    A table, a mask of attention, or what every token has, is neither.
    """
    if splice is None:
        return False
    if value.meta["val"].dtype == torch.bool:
        known = {leaf for each in splice.all for leaf in _leaves(each.mask)}
        return _leaves(value) <= known
    return all(leaf.target is aten.masked_scatter.default for leaf in _leaves(value))


def _leaves(value: Node) -> set[Node]:
    """What a value is made of by views, and by `or`."""
    todo, found = [value], set()
    while todo:
        node = todo.pop()
        if node.target in _THROUGH:
            todo.append(node.args[0])
        elif node.target in _OR:
            todo.extend(node.all_input_nodes)
        else:
            found.add(node)
    return found


def without_stand_ins(editor: Editor, moved: Node, token_map: TokenMap, spots: list[int], batch: int) -> Node:
    """Take values away from new tokens that are not the old ones whose places they have.

    Args:
        moved: a value on the new axis.
        spots: its dimensions that count tokens.
        batch: its batch dimension; -1 for none.
    """
    rank = moved.meta["val"].ndim
    for spot in spots:
        fresh = token_map.stand_ins
        for dim in range(rank):
            if dim not in (spot, batch):
                fresh = editor.call(aten.unsqueeze.default, fresh, dim) if batch >= 0 or dim else fresh
        # A negative zero leaves the sign of what it is added to as it is.
        nothing = -0.0 if moved.meta["val"].is_floating_point() else 0
        moved = editor.call(aten.masked_fill.Scalar, moved, fresh, nothing)
    return moved
