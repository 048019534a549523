"""A marked sequence as one kernel: its slots, the means of its runs, and its tokens."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch.fx import Graph, Node

from tokcompile import kernels
from tokcompile.lowering.groupgathers import changes_a_value

tokred = torch.ops.tokred


def fuse_marks(graph: Graph, nodes: Collection[Node]) -> int:
    """Write slots and the tokens in them as calls of `tokred_triton::mark_pack`.

    That is done where all that the tokens are made of exists before the slots do, but for means of the runs that only
    the tokens read, and nothing in between changes a value in place.

    Args:
        graph: changed in place.
        nodes: operators for which kernels were chosen.

    Returns:
        How many sequences are made at once.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    found = [node for node in nodes if node.target is tokred.mark_tokens.default]
    fused = [node for node in found if _fits(node, nodes, order)]
    for node in fused:
        _fuse(graph, node)
    return len(fused)


def _means(node: Node) -> bool:
    """Whether the new tokens are the means of their runs, made for this alone."""
    x, slots, content = node.args
    if not isinstance(content, Node) or content.target is not tokred.slot_means.default:
        return False
    return content.args == (x, slots) and set(content.users) == {node}


def _fits(node: Node, nodes: Collection[Node], order: dict[Node, int]) -> bool:
    x, slots, content = node.args
    if slots.target is not tokred.mark_slots.default or slots not in nodes:
        return False
    if sum(user.target is tokred.mark_tokens.default for user in slots.users) > 1:
        return False
    made_of = [x] if content is None or _means(node) else [x, content]
    between = [each for each, place in order.items() if order[slots] < place < order[node]]
    early = all(order[each] < order[slots] for each in made_of)
    return early and not any(changes_a_value(each) for each in between)


def _fuse(graph: Graph, node: Node) -> None:
    x, slots, content = node.args
    means = _means(node)
    with graph.inserting_before(slots):
        arguments = (x, *slots.args, None if means else content, means)
        call = graph.call_function(kernels.kernel_op("mark_pack"), arguments)
        parts = [graph.call_function(operator.getitem, (call, place)) for place in range(2)]
    call.meta.update({key: value for key, value in node.meta.items() if key != "val"})
    call.meta["val"] = [node.meta["val"], slots.meta["val"]]
    for part, old in zip(parts, (node, slots), strict=True):
        part.meta.update(old.meta)
        old.replace_all_uses_with(part)
    for old in (node, *([content] if means else []), slots):
        graph.erase_node(old)
