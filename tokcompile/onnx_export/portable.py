"""Operators that are ONNX's own and that runtimes lack all the same. Imports onnx_ir: see `extra.needs`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir


def spell_out(model: Any) -> None:
    """Write operators as runtimes have them.

    - Choices between truth values as And, Or and Not: ONNX Runtime has no Where for them on the CPU.
    - Tables of a fused rotary embedding, from opset 23 on, with a row for each of the batch: ONNX defines no other, and
      torch leaves one row for all.
    - Masks of a fused attention, from opset 23 on, with a row for each query: ONNX Runtime takes no single one.
    """
    for node in list(model.graph):
        if node.domain != "":
            continue
        if node.op_type == "Where" and node.outputs[0].dtype == ir.DataType.BOOL:
            _choose(model.graph, node)
        elif node.op_type == "RotaryEmbedding" and len(node.inputs) == 3:
            _spread_tables(model.graph, node)
        elif node.op_type == "Attention" and _has_one_row(node):
            _spread_mask(model.graph, node)


def _has_one_row(attention: Any) -> bool:
    """Whether a mask has one row for all queries, of which there are more or an open number."""
    query, _, _, mask = [*attention.inputs, None][:4]
    if mask is None or mask.shape is None or len(mask.shape) < 2 or len(query.shape) != 4:
        return False
    return mask.shape[-2] == 1 and query.shape[2] != 1


def _spread_mask(graph: Any, attention: Any) -> None:
    query, _, _, mask = attention.inputs[:4]
    rows = ir.node("Shape", [query], attributes={"start": 2, "end": 3})
    one = ir.node("Constant", [], attributes={"value": ir.tensor([1], ir.DataType.INT64)})
    shape = ir.node("Concat", [rows.outputs[0], one.outputs[0]], attributes={"axis": 0})
    spread = ir.node("Expand", [mask, shape.outputs[0]])
    graph.insert_before(attention, [rows, one, shape, spread])
    spread.outputs[0].dtype = mask.dtype
    attention.replace_input_with(3, spread.outputs[0])


def _choose(graph: Any, node: Any) -> None:
    condition, one, other = node.inputs
    otherwise = ir.node("Not", [condition])
    first = ir.node("And", [condition, one])
    second = ir.node("And", [otherwise.outputs[0], other])
    chosen = ir.node("Or", [first.outputs[0], second.outputs[0]])
    nodes = [otherwise, first, second, chosen]
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, chosen.outputs)


def _spread_tables(graph: Any, node: Any) -> None:
    x, *tables = node.inputs
    batch = ir.node("Shape", [x], attributes={"start": 0, "end": 1})
    ones = ir.node("Constant", [], attributes={"value": ir.tensor([1, 1], ir.DataType.INT64)})
    shape = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], attributes={"axis": 0})
    spread = [ir.node("Expand", [table, shape.outputs[0]]) for table in tables]
    graph.insert_before(node, [batch, ones, shape, *spread])
    for place, made in enumerate(spread, 1):
        made.outputs[0].dtype = x.dtype
        node.replace_input_with(place, made.outputs[0])
