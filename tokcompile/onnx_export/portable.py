"""Operators that are ONNX's own and that runtimes lack all the same. Imports onnx_ir: see `extra.needs`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def spell_out(model: Any) -> None:
    """Write choices between truth values as And, Or and Not: ONNX Runtime has no Where for them on the CPU."""
    for node in list(model.graph):
        if node.op_type == "Where" and node.domain == "" and node.outputs[0].dtype == ir.DataType.BOOL:
            _choose(model.graph, node)


def _choose(graph: Any, node: Any) -> None:
    condition, one, other = node.inputs
    otherwise = ir.node("Not", [condition])
    first = ir.node("And", [condition, one])
    second = ir.node("And", [otherwise.outputs[0], other])
    chosen = ir.node("Or", [first.outputs[0], second.outputs[0]])
    nodes = [otherwise, first, second, chosen]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, chosen.outputs)
