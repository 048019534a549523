"""ONNX forms of operators that torch has none for, or one that a runtime refuses.

All are made of operators of the default domain. Imports onnxscript: see `extra.needs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from tokcompile.kernels._order import MAX_TOKENS
from tokcompile.onnx_export.constants import constant
from tokcompile.onnx_export.walks import farthest_mask

aten = torch.ops.aten


_DOUBLINGS = tuple(1 << power for power in reversed(range(7)))
"""How many times a number is doubled or halved in turn, until it lies in [1, 2): 127 times at most."""


def view_dtype(self: Any, dtype: int) -> Any:
    """The bits of float32 numbers as int32, by arithmetic: ONNX has no operator for it before opset 26.

    A number of at least 2^-126 is halved or doubled until it lies in [1, 2): how often is its exponent, what it is then
    its mantissa, as IEEE 754 lays them out. A smaller one, a multiple of 2^-149, is that multiple. In float32, as not
    all runtimes have float64 (TensorRT clamps it), and exact, because factors are powers of two. NaN gives its usual
    bits, 0x7FC00000. Where a device counts denormal numbers as zero, so do the bits.
    """
    if self.dtype != ir.DataType.FLOAT or dtype != ir.DataType.INT32:
        raise NotImplementedError(f"bits of {self.dtype} as {ir.DataType(dtype)}")
    size = op.Abs(self)
    known = op.LessOrEqual(size, constant(np.finfo(np.float32).max, np.float32))
    infinite = op.Equal(size, constant(np.inf, np.float32))
    normal = op.And(known, op.GreaterOrEqual(size, constant(2.0**-126, np.float32)))
    rest, exponent = op.Where(normal, size, constant(1.0, np.float32)), constant(127, np.int64)
    for times in _DOUBLINGS:
        large = op.GreaterOrEqual(rest, constant(2.0**times, np.float32))
        rest = op.Where(large, op.Mul(rest, constant(2.0**-times, np.float32)), rest)
        exponent = op.Add(exponent, op.Where(large, constant(times, np.int64), constant(0, np.int64)))
    for times in _DOUBLINGS:
        small = op.Less(rest, constant(2.0 ** (1 - times), np.float32))
        rest = op.Where(small, op.Mul(rest, constant(2.0**times, np.float32)), rest)
        exponent = op.Sub(exponent, op.Where(small, constant(times, np.int64), constant(0, np.int64)))
    mantissa = op.Mul(op.Sub(rest, constant(1.0, np.float32)), constant(2.0**23, np.float32))
    bits = op.Add(op.Mul(exponent, constant(1 << 23, np.int64)), op.Cast(mantissa, to=ir.DataType.INT64))
    # In two steps, as 2^149 is no float32.
    denormal = op.Where(op.Less(size, constant(2.0**-126, np.float32)), size, constant(0.0, np.float32))
    multiple = op.Mul(op.Mul(denormal, constant(2.0**126, np.float32)), constant(2.0**23, np.float32))
    bits = op.Where(normal, bits, op.Cast(multiple, to=ir.DataType.INT64))
    bits = op.Where(infinite, constant(0x7F800000, np.int64), bits)
    bits = op.Where(op.Or(known, infinite), bits, constant(0x7FC00000, np.int64))
    # Minus infinity is what the reciprocal of -0.0 is.
    zero = op.Equal(self, constant(0.0, np.float32))
    negative = op.Less(op.Where(zero, op.Reciprocal(self), self), constant(0.0, np.float32))
    bits = op.Where(negative, op.Sub(bits, constant(1 << 31, np.int64)), bits)
    return op.Cast(bits, to=ir.DataType.INT32)


def cummax(self: Any, dim: int) -> tuple[Any, Any]:
    """Running maxima and where each was last met, by maxima over 1, 2, 4… values: log2 of the length steps.

    A length that is not known can be up to 2^24, the most tokens that the selections know.
    """
    size = op.Gather(op.Shape(self), constant(dim % len(self.shape), np.int64), axis=0)
    known = self.shape[dim]
    most = known if isinstance(known, int) else MAX_TOKENS
    places = op.Range(constant(0, np.int64), size, constant(1, np.int64))
    value = self
    shape = [1] * len(self.shape)
    shape[dim] = -1
    index = op.Expand(op.Reshape(places, constant(shape, np.int64)), op.Shape(self))
    for step in range((most - 1).bit_length()):
        # Before the first value stands the first one: it is among those that every maximum is of.
        back = op.Max(op.Sub(places, constant(1 << step, np.int64)), constant(0, np.int64))
        other, there = op.Gather(value, back, axis=dim), op.Gather(index, back, axis=dim)
        index = op.Where(op.GreaterOrEqual(value, other), index, there)
        value = op.Max(value, other)
    return value, index


def cdist(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean distances [..., P, R] of [..., P, M] and [..., R, M]."""
    if p != 2:
        raise NotImplementedError(f"distances of norm {p}")
    apart = op.Sub(op.Unsqueeze(x1, constant([-2], np.int64)), op.Unsqueeze(x2, constant([-3], np.int64)))
    return op.ReduceL2(apart, constant([-1], np.int64), keepdims=0)


def stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """A stable sort as the TopK of all: by ONNX's definition the lower index comes first among equals."""
    del stable
    size = op.Gather(op.Shape(self), constant([dim % len(self.shape)], np.int64), axis=0)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def topk(self: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, Any]:
    """The TopK with its values in order always: ONNX Runtime's CUDA provider refuses the other kind."""
    del sorted
    count = constant([k], np.int64) if isinstance(k, int) else op.Reshape(k, constant([1], np.int64))
    return op.TopK(self, count, axis=dim, largest=int(largest), sorted=1)


def masked_scatter(self: Any, mask: Any, source: Any) -> Any:
    """Values of `source`, in order, where `mask` holds: by a running count of places, so that no size depends on data.

    A mask that holds for whole rows [..., 1], spread over them, counts rows, as embeddings of images in a text do.
    """
    rows = _spread(mask)
    width = self.shape[-1]
    if rows is None or not isinstance(width, int) or source.shape is None or source.shape[-1] != width:
        rows, width = op.Expand(mask, op.Shape(self)), 1
    flags = op.Cast(op.Reshape(rows, constant([-1], np.int64)), to=ir.DataType.INT64)
    before = op.Sub(op.CumSum(flags, constant(0, np.int64)), constant(1, np.int64))
    table = op.Reshape(source, constant([-1, width], np.int64))
    found = op.Gather(table, op.Max(before, constant(0, np.int64)), axis=0)
    return op.Where(rows, op.Reshape(found, op.Shape(self)), self)


def _spread(mask: Any) -> Any:
    """What a mask was expanded from, where that has one value for each row of the last dimension."""
    made = mask.producer()
    if made is None or made.op_type != "Expand":
        return None
    rows = made.inputs[0]
    return rows if rows.shape is not None and len(rows.shape) == len(mask.shape) and rows.shape[-1] == 1 else None


def remainder(self: Any, other: Any) -> Any:
    """The remainder by a number, with its sign: one that may be a size, where the exporter's form needs a constant."""
    fixed = isinstance(other, (int, float))
    divisor = constant(other, self.dtype.numpy()) if fixed else op.CastLike(other, self)
    if self.dtype.is_integer():
        return op.Mod(self, divisor)
    return op.Sub(self, op.Mul(op.Floor(op.Div(self, divisor)), divisor))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.view.dtype: view_dtype,
    aten.cummax.default: cummax,
    aten._cdist_forward.default: cdist,
    aten.masked_scatter.default: masked_scatter,
    aten.sort.stable: stable_sort,
    aten.topk.default: topk,
    aten.remainder.Scalar: remainder,
    torch.ops.tokred.farthest_mask.default: farthest_mask,
}
