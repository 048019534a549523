"""Write products of a matrix with a single row as reductions, which Inductor makes one parallel pass over the weights.

A step that generates one token for one sequence spends its time on reading weights. The library that PyTorch calls on
CPUs for such a product reaches about half of the memory's bandwidth; a fused reduction reaches all of it.
"""

from __future__ import annotations

from math import prod

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
LEAST = 1 << 16
"""Elements of a weight from which it counts: smaller ones are in the processor's caches anyway."""


def reduce_row_products(gm: GraphModule) -> int:
    """Replace `aten.linear` of one row on a CPU by a product and a sum in float32.

    Args:
        gm: a rewritten graph with fake values; changed in place.

    Returns:
        How many were replaced.
    """
    found = [node for node in gm.graph.nodes if node.target is aten.linear.default and _is_row(node)]
    for node in found:
        _reduce(gm, node)
    if found:
        gm.graph.lint()
        gm.recompile()
    return len(found)


def _is_row(node: Node) -> bool:
    values = [argument.meta.get("val") for argument in node.args[:2] if isinstance(argument, Node)]
    if len(values) != 2 or not all(isinstance(value, torch.Tensor) for value in values):
        return False
    row, weight = values
    sizes = [*row.shape, *weight.shape]
    if not all(isinstance(size, int) for size in sizes) or not row.dtype.is_floating_point:
        return False
    one = prod(row.shape[:-1]) == 1 and weight.ndim == 2
    return one and row.device.type == "cpu" and weight.is_contiguous() and weight.numel() >= LEAST


def _reduce(gm: GraphModule, node: Node) -> None:
    row, weight, *bias = (argument for argument in node.args if argument is not None)
    value = node.meta["val"]
    features = row.meta["val"].shape[-1]

    def call(target: object, *args: object) -> Node:
        made = gm.graph.call_function(target, args)
        made.meta.update({key: item for key, item in node.meta.items() if key != "val"})
        return made

    with gm.graph.inserting_before(node):
        flat = call(aten.reshape.default, row, [features])
        # Inductor would compute what the row is made of once for each row of the weight, were it not stored.
        stored = call(aten.as_strided.default, call(aten.contiguous.default, flat), [features], [1])
        factors = [call(aten.to.dtype, each, torch.float32) for each in (stored, weight)]
        total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, *factors), [1])
        for each in bias:
            total = call(aten.add.Tensor, total, each)
        made = call(aten.reshape.default, call(aten.to.dtype, total, value.dtype), list(value.shape))
    made.meta["val"] = value
    node.replace_all_uses_with(made)
    gm.graph.erase_node(node)
