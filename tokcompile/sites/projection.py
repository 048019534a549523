"""Where the attention of a block begins and ends: the value that is projected, and the projected result."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.block import VIEWS, Block
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
_PROJECTIONS = {aten.linear.default: 0, aten.addmm.default: 1}


def projection_input(block: Block) -> Node:
    """The one value [B, T, C] that queries, keys and values of a block's self-attention are projections of.

    Raises:
        EditError: they are projections of several values, or of one that was not found.
    """
    site = block.attention
    found = {_projected_from(node) for node in (site.query, site.key, site.value)}
    start = found.pop() if len(found) == 1 else None
    while start is not None and start.meta["val"].ndim != 3:
        start = start.args[0] if start.args and isinstance(start.args[0], Node) else None
    if start is None:
        raise EditError(
            "queries, keys and values are not projections of one value",
            where=[place(site.node)],
            found=", ".join(sorted(node.name for node in found if node is not None)) or "no linear map",
        )
    return start


def _projected_from(node: Node) -> Node | None:
    """The input of the linear map that a value comes from, through views, norms and scales."""
    while isinstance(node, Node) and node.op == "call_function":
        if node.target in _PROJECTIONS:
            return node.args[_PROJECTIONS[node.target]]
        node = node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]
    return None


def projected(block: Block, reach: Reach) -> Node:
    """The result [B, T, C] of a block's self-attention after the linear map that follows it.

    Raises:
        EditError: no linear map follows.
    """
    site = block.attention
    node = next((each for each in reach.forward(site.node) if each.target in _PROJECTIONS), None)
    while node is not None and node.meta["val"].ndim != 3:
        readers = list(node.users)
        node = readers[0] if len(readers) == 1 and readers[0].target in VIEWS else None
    if node is None:
        raise EditError("the result of an attention is not projected", where=[place(site.node)])
    return node
