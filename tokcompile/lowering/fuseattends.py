"""Attention to chosen keys as one kernel that reads them in the cache, where otherwise they would be copied before."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from tokcompile import kernels
from tokcompile.lowering.groupgathers import changes_a_value

tokred = torch.ops.tokred


def fuse_attends(graph: Graph, nodes: Collection[Node]) -> int:
    """Write attention to gathered keys, values and mask columns as calls of `tokred_triton::attend_chosen`.

    That is done where all three were gathered by one index, for this attention alone, and nothing in between changes
    a value in place.

    Args:
        graph: changed in place.
        nodes: operators for which kernels were chosen.

    Returns:
        How many attentions read their keys where they are.
    """
    found = [node for node in nodes if node.target is tokred.attend.default]
    fused = [node for node in found if _gathered(node, nodes) and not _changed(graph, node)]
    for node in fused:
        _fuse(graph, node)
    return len(fused)


def _gathers(node: Node) -> list[Node]:
    """What an attention reads beside its queries: keys, values, and a mask where there is one."""
    return [each for each in node.args[1:4] if isinstance(each, Node)]


def _gathered(node: Node, nodes: Collection[Node]) -> bool:
    key, value, *mask = _gathers(node)
    wanted = [(key, tokred.gather_keys.default), (value, tokred.gather_keys.default)]
    wanted += [(each, tokred.gather_mask.default) for each in mask]
    return all(
        each.target is target and each in nodes and each.args[1] is key.args[1] and set(each.users) == {node}
        for each, target in wanted
    )


def _changed(graph: Graph, node: Node) -> bool:
    """Whether anything is changed in place after the first gather and before the attention."""
    order = list(graph.nodes)
    begin = min(order.index(each) for each in _gathers(node))
    return any(changes_a_value(each) for each in order[begin : order.index(node)])


def _fuse(graph: Graph, node: Node) -> None:
    query, key, value, mask, *how = node.args
    gathers = _gathers(node)
    seen = None if mask is None else mask.args[0]
    with graph.inserting_before(node):
        call = graph.call_function(
            kernels.kernel_op("attend_chosen"), (query, key.args[0], value.args[0], seen, key.args[1], *how)
        )
    call.meta.update(node.meta)
    node.replace_all_uses_with(call)
    for each in (node, *dict.fromkeys(gathers)):
        graph.erase_node(each)
