"""Gathers by one index as one launch: all that an edit moves by one token map, or keys and values of one cache.

A gather moves bytes and computes nothing. What many small ones cost on a GPU is their launches.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from tokcompile import kernels

tokred = torch.ops.tokred
MOST = 4
"""Values of one launch; see kernels/triton_gather_many.py."""

FORMS = {
    tokred.gather_tokens.default: 0,
    tokred.gather_keys.default: 1,
    tokred.gather_mask.default: 2,
    tokred.gather_pairs.default: 3,
}
"""How each operator reads its index, as `gather_many` counts them."""


def group_gathers(graph: Graph, nodes: Sequence[Node]) -> int:
    """Write gathers that share an index as calls of `tokred_triton::gather_many`, which needs Triton.

    Gathers become one where all of their values exist before the first of their results is read, and nothing in between
    changes a value in place.

    Args:
        graph: changed in place.
        nodes: operators for which kernels were chosen, in the order of the graph.

    Returns:
        How many gathers are now part of another's launch.
    """
    left = [node for node in nodes if node.target in FORMS and isinstance(node.args[1], Node)]
    joined = 0
    while left:
        first, *others = left
        group = _group(graph, first, [node for node in others if _alike(first, node)])
        if len(group) > 1:
            _join(graph, group)
            joined += len(group) - 1
        left = [node for node in others if node not in group]
    return joined


def _alike(one: Node, other: Node) -> bool:
    pairs = tokred.gather_pairs.default
    return one.args[1] is other.args[1] and (one.target is pairs) == (other.target is pairs)


def _group(graph: Graph, first: Node, others: Sequence[Node]) -> list[Node]:
    group = [first]
    if not others:
        return group
    order = {node: place for place, node in enumerate(graph.nodes)}
    changes = [place for node, place in order.items() if changes_a_value(node)]
    for node in others:
        if len(group) < MOST and _fits([*group, node], order, changes):
            group.append(node)
    return group


def changes_a_value(node: Node) -> bool:
    """Whether a call writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _fits(group: Sequence[Node], order: dict[Node, int], changes: Sequence[int]) -> bool:
    if any(argument in group for node in group for argument in node.all_input_nodes):
        return False
    last = order[_anchor(group, order)]
    span = range(min(order[node] for node in group), max(last, *(order[node] for node in group)) + 1)
    read = min((order[user] for node in group for user in node.users), default=len(order))
    return last < read and not any(place in span for place in changes)


def _anchor(group: Sequence[Node], order: dict[Node, int]) -> Node:
    """After which node the launch stands: the last of its arguments, or the first gather where that is later."""
    arguments = (argument for node in group for argument in node.all_input_nodes)
    return max([group[0], *arguments], key=order.__getitem__)


def _join(graph: Graph, group: Sequence[Node]) -> None:
    order = {node: place for place, node in enumerate(graph.nodes)}
    values = [node.args[0] for node in group]
    forms = [number for node in group for number in _form(node)]
    with graph.inserting_after(_anchor(group, order)):
        call = graph.call_function(kernels.kernel_op("gather_many"), (values, group[0].args[1], forms))
    call.meta.update({key: value for key, value in group[0].meta.items() if key != "val"})
    call.meta["val"] = [node.meta["val"] for node in group]
    after = call
    for place, node in enumerate(group):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (call, place))
        after.meta.update(node.meta)
        node.replace_all_uses_with(after)
        graph.erase_node(node)


def _form(node: Node) -> tuple[int, int, int]:
    dim, batch = node.args[2:] if node.target is tokred.gather_tokens.default else (0, 0)
    return FORMS[node.target], dim, batch
