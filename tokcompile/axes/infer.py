"""Token-axis inference: which dimension of which value counts tokens of which sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tokcompile.axes.atoms import Dim, fresh, resolve, size_of
from tokcompile.axes.context import Context, Dims
from tokcompile.axes.ours import OURS, flagged_tokens
from tokcompile.axes.products import attention, matmul
from tokcompile.axes.rules import NAMED, RULES, masked_scatter, pointwise


@dataclass
class Axes:
    """The dimensions of every value of a graph, as resolved atoms."""

    context: Context
    unknown: set[Node]

    def of(self, node: Node) -> Dims:
        """Dimensions of a tensor value, each a tuple of atoms (most significant first); [] for other values."""
        dims = self.context.dims.get(node, [])
        if dims and isinstance(dims[0], list):
            return []
        return [resolve(dim) for dim in dims]

    def dim(self, node: Node, position: int) -> Dim:
        """One dimension of a tensor value."""
        return self.of(node)[position]

    def where(self, node: Node, dim: Dim) -> list[int]:
        """Positions at which a value's dimension contains all atoms of the given one."""
        wanted = resolve(dim)
        return [i for i, have in enumerate(self.of(node)) if wanted and all(atom in have for atom in wanted)]


def infer(graph: Graph) -> Axes:
    """Infer the dimensions of every value of a pre-dispatch ATen graph.

    Each node must carry its fake value in `meta["val"]`. An operator without a rule gets fresh atoms and is listed in
    `Axes.unknown`; an edit that reaches it is refused there, by name.
    """
    ctx, unknown = Context(), set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op == "output" or not _has_tensor(value):
            continue
        rule = _rule(node)
        if rule is not None:
            ctx.dims[node] = rule(ctx, node)
            continue
        if node.op == "call_function":
            unknown.add(node)
        ctx.dims[node] = _fresh_like(value)
    return Axes(ctx, unknown)


def _has_tensor(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(isinstance(v, torch.Tensor) for v in value)
    return isinstance(value, torch.Tensor)


def _fresh_like(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [fresh(size_of(s)) for s in value.shape]
    return [_fresh_like(v) if isinstance(v, torch.Tensor) else [] for v in value]


def _rule(node: Node) -> Any:
    if node.op != "call_function":
        return None
    if node.target in RULES:
        return RULES[node.target]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target.namespace == "tokred":
        return OURS.get(node.target._schema.name.split("::")[1])
    if node.target.namespace != "aten":
        return NAMED.get(node.target._schema.name.split("::")[1])
    if torch.Tag.pointwise in node.target.tags:
        return pointwise
    return None


def broadcasts(node: Node) -> bool:
    """Whether an operator aligns its inputs with its result from the right, size 1 standing for any size."""
    return _rule(node) in (pointwise, matmul, attention, masked_scatter, flagged_tokens)
