"""ONNX forms of ATen operators that torch has none for, or one that a runtime refuses.

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

aten = torch.ops.aten

_EXPONENTS = 280
"""Powers of two from the least float32, 2^-149, to past the greatest."""


def _constant(value: Any, dtype: Any) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype)))


def view_dtype(self: Any, dtype: int) -> Any:
    """The bits of float32 numbers as int32, by arithmetic: ONNX has no operator for it before opset 26.

    With y = |x| 2^149, which is whole, the bits of |x| are y below 2^23 and else those of its exponent and of what is
    left of it, as IEEE 754 lays them out. Exact: factors are powers of two. NaN gives its usual bits, 0x7FC00000.
    """
    if self.dtype != ir.DataType.FLOAT or dtype != ir.DataType.INT32:
        raise NotImplementedError(f"bits of {self.dtype} as {ir.DataType(dtype)}")
    x = op.Cast(self, to=ir.DataType.DOUBLE)
    scaled = op.Mul(op.Abs(x), _constant(2.0**149, np.float64))
    infinite = op.IsInf(x)
    number = op.Not(op.Or(infinite, op.IsNaN(x)))
    rest = op.Where(number, scaled, _constant(1.0, np.float64))
    exponent = op.Mul(rest, _constant(0.0, np.float64))
    for bit in reversed(range(_EXPONENTS.bit_length())):
        large = op.GreaterOrEqual(rest, _constant(2.0 ** (1 << bit), np.float64))
        factor, gained = _constant(2.0 ** -(1 << bit), np.float64), _constant(1 << bit, np.float64)
        rest = op.Where(large, op.Mul(rest, factor), rest)
        exponent = op.Where(large, op.Add(exponent, gained), exponent)
    # 2^149 stands for 2^0, whose exponent is stored as 127, and what is left of it begins with 1.
    normal = op.Mul(op.Add(op.Sub(exponent, _constant(23, np.float64)), rest), _constant(2.0**23, np.float64))
    bits = op.Where(op.Less(scaled, _constant(2.0**23, np.float64)), scaled, normal)
    bits = op.Where(number, bits, _constant(0x7FC00000, np.float64))
    bits = op.Cast(op.Where(infinite, _constant(0x7F800000, np.float64), bits), to=ir.DataType.INT64)
    # Minus infinity is what the reciprocal of -0.0 is.
    zero = op.Equal(x, _constant(0.0, np.float64))
    negative = op.Less(op.Where(zero, op.Reciprocal(x), x), _constant(0.0, np.float64))
    bits = op.Where(negative, op.Sub(bits, _constant(1 << 31, np.int64)), bits)
    return op.Cast(bits, to=ir.DataType.INT32)


def cummax(self: Any, dim: int) -> tuple[Any, Any]:
    """Running maxima and where each was last met, by maxima over 1, 2, 4… values: log2 of the length steps.

    A length that is not known can be up to 2^24, the most tokens that the selections know.
    """
    size = op.Gather(op.Shape(self), _constant(dim % len(self.shape), np.int64), axis=0)
    known = self.shape[dim]
    most = known if isinstance(known, int) else MAX_TOKENS
    places = op.Range(_constant(0, np.int64), size, _constant(1, np.int64))
    value = self
    shape = [1] * len(self.shape)
    shape[dim] = -1
    index = op.Expand(op.Reshape(places, _constant(shape, np.int64)), op.Shape(self))
    for step in range((most - 1).bit_length()):
        # Before the first value stands the first one: it is among those that every maximum is of.
        back = op.Max(op.Sub(places, _constant(1 << step, np.int64)), _constant(0, np.int64))
        other, there = op.Gather(value, back, axis=dim), op.Gather(index, back, axis=dim)
        index = op.Where(op.GreaterOrEqual(value, other), index, there)
        value = op.Max(value, other)
    return value, index


def cdist(x1: Any, x2: Any, p: float, compute_mode: int | None = None) -> Any:
    """Euclidean distances [..., P, R] of [..., P, M] and [..., R, M]."""
    if p != 2:
        raise NotImplementedError(f"distances of norm {p}")
    apart = op.Sub(op.Unsqueeze(x1, _constant([-2], np.int64)), op.Unsqueeze(x2, _constant([-3], np.int64)))
    return op.ReduceL2(apart, _constant([-1], np.int64), keepdims=0)


def stable_sort(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    """A stable sort as the TopK of all: by ONNX's definition the lower index comes first among equals."""
    del stable
    size = op.Gather(op.Shape(self), _constant([dim % len(self.shape)], np.int64), axis=0)
    return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)


def topk(self: Any, k: Any, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, Any]:
    """The TopK with its values in order always: ONNX Runtime's CUDA provider refuses the other kind."""
    del sorted
    count = _constant([k], np.int64) if isinstance(k, int) else op.Reshape(k, _constant([1], np.int64))
    return op.TopK(self, count, axis=dim, largest=int(largest), sorted=1)


def remainder(self: Any, other: Any) -> Any:
    """The remainder by a number, with its sign: one that may be a size, where the exporter's form needs a constant."""
    fixed = isinstance(other, (int, float))
    divisor = _constant(other, self.dtype.numpy()) if fixed else op.CastLike(other, self)
    if self.dtype.is_integer():
        return op.Mod(self, divisor)
    return op.Sub(self, op.Mul(op.Floor(op.Div(self, divisor)), divisor))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.view.dtype: view_dtype,
    aten.cummax.default: cummax,
    aten._cdist_forward.default: cdist,
    aten.sort.stable: stable_sort,
    aten.topk.default: topk,
    aten.remainder.Scalar: remainder,
}
