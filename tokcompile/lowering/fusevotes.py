"""Votes for keys at other positions as one kernel that turns them in registers, where a turned copy was made before."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from tokcompile import kernels
from tokcompile.lowering.groupgathers import changes_a_value

tokred = torch.ops.tokred
KERNEL = "turned_votes"
COORDINATE = 6
"""The place of `coordinate` among the arguments of `turn_pairs`, which may end before it."""


def fuse_votes(graph: Graph, nodes: Collection[Node]) -> int:
    """Write votes for keys that were turned for them alone as calls of `tokred_triton::turned_votes`.

    Args:
        graph: changed in place.
        nodes: operators for which kernels were chosen.

    Returns:
        How many votes turn their keys themselves.
    """
    found = [node for node in nodes if node.target is tokred.key_votes.default and _fits(graph, node, nodes)]
    for node in found:
        _fuse(graph, node)
    return len(found)


def _fits(graph: Graph, node: Node, nodes: Collection[Node]) -> bool:
    turned = node.args[1]
    if turned.target is not tokred.turn_pairs.default or turned not in nodes or set(turned.users) != {node}:
        return False
    if kernels.kernel_fault(KERNEL, map_arg(_arguments(node), lambda each: each.meta["val"])):
        return False
    order = list(graph.nodes)
    return not any(changes_a_value(each) for each in order[order.index(turned) : order.index(node)])


def _arguments(node: Node) -> tuple[Any, ...]:
    """What the kernel takes in the place of votes and of the turn before them."""
    query, turned, *how = node.args
    return query, *turned.args, *[None] * (COORDINATE + 1 - len(turned.args)), *how


def _fuse(graph: Graph, node: Node) -> None:
    turned = node.args[1]
    with graph.inserting_before(node):
        call = graph.call_function(kernels.kernel_op(KERNEL), _arguments(node))
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    graph.erase_node(turned)
