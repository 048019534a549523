"""Open the regions that torch.export closes off: blocks of a model under `no_grad` or under a disabled autocast."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, GraphModule, Node

higher = torch.ops.higher_order
aten = torch.ops.aten


def inline_regions(gm: GraphModule) -> int:
    """Put the nodes of closed-off regions into the graph around them, so that matchers see them.

    What a region without gradients hands out is detached, so that gradients still end there. A region under an enabled
    autocast stays closed: its operators mean something else outside.

    Returns:
        How many regions were opened.
    """
    opened = 0
    todo = [n for n in gm.graph.nodes if _submodule(n) is not None]
    while todo:
        node = todo.pop()
        copies = _open(gm, node)
        opened += 1
        todo += [n for n in copies if _submodule(n) is not None]
    if opened:
        gm.graph.eliminate_dead_code()
        gm.delete_all_unused_submodules()
    return opened


def _submodule(node: Node) -> tuple[Node, tuple[Node, ...]] | None:
    """The submodule and the operands of a region that may be opened."""
    if node.target is higher.wrap_with_set_grad_enabled:
        return node.args[1], node.args[2:]
    if node.target is higher.wrap_with_autocast and not node.args[2]:
        return node.args[4], node.args[5:]
    return None


def _open(gm: GraphModule, node: Node) -> list[Node]:
    holder, operands = _submodule(node)  # type: ignore[misc]
    inner = gm.get_submodule(str(holder.target))
    before = set(gm.graph.nodes)
    places = [n for n in inner.graph.nodes if n.op == "placeholder"]
    with gm.graph.inserting_before(node):
        made = gm.graph.graph_copy(inner.graph, dict(zip(places, operands, strict=True)))
        copies = [n for n in gm.graph.nodes if n not in before]
        for copy in copies:
            if copy.op == "get_attr":
                _adopt(gm, inner, copy)
        results = made if isinstance(made, (tuple, list)) else (made,)
        ends_gradients = node.target is higher.wrap_with_set_grad_enabled and not node.args[0]
        if ends_gradients:
            results = [_detached(gm.graph, value) for value in results]
    for user in list(node.users):
        if user.target is not operator.getitem:
            raise NotImplementedError(f"{user.target} reads a closed-off region as a whole")
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)
    return copies


def _adopt(gm: GraphModule, inner: GraphModule, node: Node) -> None:
    """Bring what a region holds (constants, inner regions) to the graph around it."""
    value = inner
    for part in str(node.target).split("."):
        value = getattr(value, part)
    name = f"_inlined_{len([n for n in gm.graph.nodes if n.op == 'get_attr'])}_{str(node.target).replace('.', '_')}"
    setattr(gm, name, value)
    node.target = name


def _detached(graph: Graph, value: Node) -> Node:
    if not isinstance(value, Node) or not value.meta["val"].dtype.is_floating_point:
        return value
    made = graph.call_function(aten.detach.default, (value,))
    made.meta = dict(value.meta)
    return made
