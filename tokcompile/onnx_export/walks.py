"""The ONNX form of a walk from token to token: a Loop, with a turn for each that is chosen.

Imports onnxscript: see `extra.needs`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import evaluator
from onnxscript import opset18 as op

from tokcompile.onnx_export.constants import constant

LOWEST = float(np.finfo(np.float32).min)


def farthest_mask(distances: Any, start: Any, among: Any, k: Any) -> Any:
    """As the reference of `tokred::farthest_mask`, of distances that are finite."""
    size = start.shape
    distances, start = (op.Cast(each, to=ir.DataType.FLOAT) for each in (distances, start))
    everything = op.Equal(start, start)
    inside = op.Or(everything, op.Not(everything)) if among is None else among
    turns = constant(k, np.int64) if isinstance(k, int) else op.Reshape(k, constant([], np.int64))
    # Floats, which every runtime carries from turn to turn: 1 for a token that was not visited.
    free = op.Cast(op.Or(inside, op.Not(inside)), to=ir.DataType.FLOAT)
    far = op.Where(op.IsNaN(start), constant(LOWEST, np.float32), start)
    recorder = evaluator.default()
    body = ir.AttrGraph("body", _turn(distances, inside))
    loop = ir.Node("", "Loop", [turns, None, far, free], [body], num_outputs=2)
    for made in loop.outputs:
        made.dtype, made.shape = ir.DataType.FLOAT, size
    recorder.nodes.append(loop)
    return op.Less(loop.outputs[1], constant(0.5, np.float32))


def _turn(distances: Any, inside: Any) -> ir.Graph:
    """The body: from the distances to all visited tokens, and which are free, to those after one more."""
    size = ir.Shape([None, None])
    step = ir.Value(name="walk_step", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    goes_on = ir.Value(name="walk_goes_on", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    far = ir.Value(name="walk_far", shape=size, type=ir.TensorType(ir.DataType.FLOAT))
    free = ir.Value(name="walk_free", shape=size, type=ir.TensorType(ir.DataType.FLOAT))
    recorder = evaluator.default()
    outer, recorder.nodes = recorder.nodes, []
    try:
        results = _after_one_more(step, far, free, distances, inside)
        results = (constant(True, np.bool_), *results)
        nodes = recorder.nodes
    finally:
        recorder.nodes = outer
    for made, name, taken in zip(results, ("goes_on", "far", "free"), (goes_on, far, free), strict=True):
        made.name, made.dtype, made.shape = f"walk_next_{name}", taken.dtype, taken.shape
    return ir.Graph([step, goes_on, far, free], results, nodes=nodes, name="walk")


def _after_one_more(step: Any, far: Any, free: Any, distances: Any, inside: Any) -> tuple[Any, Any]:
    is_free = op.Greater(free, constant(0.5, np.float32))
    # What is up for choice is above the rest that is free, and that above what was visited.
    best = op.Max(far, constant(LOWEST / 2, np.float32))
    others = op.Where(is_free, constant(LOWEST, np.float32), constant(-np.inf, np.float32))
    at = op.ArgMax(op.Where(op.And(is_free, inside), best, others), axis=1, keepdims=1, select_last_index=0)
    row = op.GatherND(distances, at, batch_dims=1)
    tokens = op.Range(constant(0, np.int64), _length(far), constant(1, np.int64))
    visited = op.Equal(op.Unsqueeze(tokens, constant([0], np.int64)), at)
    first = op.Equal(step, constant(0, np.int64))
    return op.Where(first, row, op.Min(far, row)), op.Where(visited, constant(0.0, np.float32), free)


def _length(rows: Any) -> Any:
    return op.Gather(op.Shape(rows), constant(1, np.int64), axis=0)
