"""Functions mapped over ranges (torch.vmap), written as the broadcasts that they are.

transformers builds masks so: a function of four numbers (row, head, query, key) is mapped over four ranges. Traced
below Dynamo, what happens inside a map escapes the tracer. Here each level of the map becomes a dimension of its own,
which is the same for operators that broadcast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C._functorch import is_batchedtensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tokcompile.errors import CaptureError

_PREFIX = "torch._functorch.predispatch"
_SCALAR = {"new_ones", "new_zeros", "new_full"}
_BROADCASTS = {
    *("le", "lt", "ge", "gt", "eq", "ne", "__eq__", "__ne__", "__le__", "__lt__", "__ge__", "__gt__", "and_", "or_"),
    *("__and__", "__or__", "__xor__", "__invert__", "invert", "bitwise_not", "logical_not", "add", "sub", "mul", "abs"),
    *("floordiv", "floor_divide", "mod", "remainder", "to", "where", "logical_and", "logical_or", "xor", "neg"),
    *("bitwise_and", "bitwise_or", "minimum", "maximum", "clamp"),
}
_INDEX = {"index", "getitem"}
_INDEX_BY_NUMBERS = ".ModIndex"
"""The function of PyTorch that an index by mapped numbers becomes in an exported graph."""
aten = torch.ops.aten


def _role(node: Node) -> str:
    """The name of a function of vmap's own; "" for any other node."""
    target = node.target
    if node.op != "call_function" or getattr(target, "__module__", "") != _PREFIX:
        return ""
    return target.__name__


def broadcast_maps(gm: GraphModule) -> GraphModule:
    """Return a graph without maps over ranges; the given one stays as it is.

    Args:
        gm: of torch functions, as Dynamo makes it, or of ATen operators, as torch.export does.

    Raises:
        CaptureError: something inside a map is no broadcast.
    """
    if not any(_role(node) for node in gm.graph.nodes):
        return gm
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    graph.eliminate_dead_code()
    made = GraphModule(gm, graph)
    depth = max((n.args[2] for n in graph.nodes if _role(n) == "_add_batch_dim"), default=0)
    mapped: set[Node] = set()
    for node in list(graph.nodes):
        _rewrite(graph, node, depth, mapped)
    for node in graph.nodes:
        _measure(node)
    made.recompile()
    return made


def _measure(node: Node) -> None:
    """Give a value of an exported graph the shape that it has outside of a map."""
    old = node.meta.get("val")
    mapped = isinstance(old, torch.Tensor) and is_batchedtensor(old)
    if node.op != "call_function" or not (old is None or mapped):
        return
    if all("val" in a.meta for a in node.all_input_nodes):
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        node.meta["val"] = node.target(*args, **kwargs)


def _rewrite(graph: Graph, node: Node, depth: int, mapped: set[Node]) -> None:
    role = _role(node)
    if role == "_add_batch_dim":
        value, dim, level = node.args
        fake = value.meta.get("example_value", value.meta.get("val"))
        if dim != 0 or not isinstance(fake, torch.Tensor) or fake.ndim != 1:
            raise _refused(node)
        spread = _reshaped(graph, node, "view", value, [-1 if i == level - 1 else 1 for i in range(depth)])
        mapped.add(_replaced(graph, node, spread))
    elif role == "_remove_batch_dim":
        value, level, size, dim = node.args
        if dim != 0:
            raise _refused(node)
        wide = _reshaped(graph, node, "expand", value, [size if i == level - 1 else -1 for i in range(depth)])
        made = _replaced(graph, node, wide)
        if level > 1:
            mapped.add(made)
    elif role:
        if node.users:
            raise _refused(node)
        graph.erase_node(node)
    elif mapped & set(node.all_input_nodes):
        if node.target is aten._assert_tensor_metadata.default:  # of a value that has fewer dimensions
            graph.erase_node(node)
            return
        if node.target is torch.ops.higher_order.flat_apply and str(node.args[2]).endswith(_INDEX_BY_NUMBERS):
            node.target, node.args = aten.index.Tensor, (node.args[3], list(node.args[4:]))
        _check(node, mapped)
        if _name(node) not in _SCALAR:
            mapped.add(node)


def _reshaped(graph: Graph, node: Node, name: str, value: Node, sizes: list[Any]) -> Node:
    with graph.inserting_before(node):
        if "val" in node.meta:
            return graph.call_function(getattr(aten, name).default, (value, sizes))
        return graph.call_method(name, (value, *sizes))


def _replaced(graph: Graph, node: Node, made: Node) -> Node:
    made.meta = {k: v for k, v in node.meta.items() if k not in ("example_value", "val")}
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def _name(node: Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    name = getattr(target, "__name__", str(target))
    return name.split(".")[0]


def _check(node: Node, mapped: set[Node]) -> None:
    """Inside a map an operator sees numbers; outside, it must do the same to each."""
    name = _name(node)
    if name in _SCALAR and list(node.args[1]) == []:
        return
    if name in _INDEX:
        table, places = node.args[0], node.args[1]
        places = places if isinstance(places, (tuple, list)) else [places]
        if table not in mapped and all(p in mapped for p in places):
            return
    elif name in _BROADCASTS:
        return
    raise _refused(node)


def _refused(node: Node) -> CaptureError:
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip().startswith("File ")]
    return CaptureError(
        "the model maps a function with torch.vmap in a way that is no broadcast",
        where=[f"graph node '{node.name}'", *lines[-1:]],
        found=f"{_name(node)} inside the map",
        remedy="write it with broadcasts, or let the model take the mask as an input",
    )
