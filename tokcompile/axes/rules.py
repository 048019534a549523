"""How each ATen operator aligns the dimensions of its inputs and outputs: one small function per operator.

A rule takes the node and returns the dimensions of its result (a list of them per result for operators with several).
An operator without a rule gives fresh atoms; that matters only when an edit reaches it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes.atoms import divide, fresh, product, resolve, size_of
from tokcompile.axes.context import Context, Dims, arg, shape, wrap
from tokcompile.axes.products import addmm, attention, conv, einsum, grouped, linear, matmul
from tokcompile.axes.sorts import numbered, ordered, written
from tokcompile.axes.views import (
    cat,
    expand,
    permute,
    pieces,
    select,
    slice_,
    squeeze,
    stack,
    transpose,
    unsqueeze,
    view,
)
from tokcompile.axes.windows import resampled, windows

aten = torch.ops.aten


def pointwise(ctx: Context, node: Node) -> Dims:
    """Operators that broadcast their tensor inputs from the right."""
    sizes = shape(node)
    out: Dims = [() for _ in sizes]
    for value in node.all_input_nodes:
        dims = ctx.of(value)
        for offset in range(1, len(dims) + 1):
            if offset > len(sizes) or not dims[-offset]:
                continue
            if out[-offset]:
                ctx.unify(node, out[-offset], dims[-offset])
            else:
                out[-offset] = dims[-offset]
    return [dim or fresh(size) for dim, size in zip(out, sizes, strict=True)]


def like_first(ctx: Context, node: Node) -> Dims:
    """Operators whose result has the dimensions of their first argument."""
    return list(ctx.of(node.args[0]))


def norm(ctx: Context, node: Node) -> Dims:
    """layer_norm and rms_norm: weights align with the normalised dimensions."""
    dims = list(ctx.of(node.args[0]))
    for weight in node.all_input_nodes[1:]:
        for offset in range(1, len(ctx.of(weight)) + 1):
            ctx.unify(node, dims[-offset], ctx.of(weight)[-offset])
    return dims


def getitem(ctx: Context, node: Node) -> Dims:
    """Take one result of an operator with several."""
    return list(ctx.dims[node.args[0]][node.args[1]])


def reduce(ctx: Context, node: Node) -> Dims:
    """Reductions over some dimensions or all."""
    dims = list(ctx.of(node.args[0]))
    which = arg(node, 1, "dim")
    keep = arg(node, 2, "keepdim", False)
    if isinstance(which, bool) or not isinstance(which, (int, Sequence)):
        which = []
    gone = {wrap(d, len(dims)) for d in ([which] if isinstance(which, int) else which)} or set(range(len(dims)))
    if len(shape(node)) == len(dims):
        keep = True
    return [() if i in gone else dim for i, dim in enumerate(dims) if keep or i not in gone]


def embedding(ctx: Context, node: Node) -> Dims:
    """Look rows of a table up."""
    return [*ctx.of(node.args[1]), ctx.of(node.args[0])[-1]]


def index(ctx: Context, node: Node) -> Dims:
    """Advanced indexing with index tensors that stand side by side."""
    dims, indices = ctx.of(node.args[0]), list(node.args[1])
    used = [i for i, value in enumerate(indices) if value is not None]
    if len(used) == 1 and indices[used[0]].meta["val"].dtype == torch.bool:  # as many as the mask has True
        rank = indices[used[0]].meta["val"].ndim
        return [*dims[: used[0]], fresh(shape(node)[used[0]]), *dims[used[0] + rank :]]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return [fresh(s) for s in shape(node)]
    rank = max(len(ctx.of(indices[i])) for i in used)
    middle: Dims = [()] * rank
    for i in used:
        for offset, dim in enumerate(reversed(ctx.of(indices[i])), 1):
            if dim and middle[-offset]:
                ctx.unify(node, middle[-offset], dim)
            middle[-offset] = middle[-offset] or dim
    return [*dims[: used[0]], *middle, *dims[used[-1] + 1 :]]


def like_second(ctx: Context, node: Node) -> Dims:
    """copy_: the result has the dimensions of the target, which the source broadcasts to."""
    dims = list(ctx.of(node.args[0]))
    for one, other in zip(reversed(dims), reversed(ctx.of(node.args[1])), strict=False):
        ctx.unify(node, one, other)
    return dims


def chosen(ctx: Context, node: Node) -> list[Dims]:
    """topk, max and min along one dimension: the same for values and indices, that dimension anew or gone."""
    dims = list(ctx.of(node.args[0]))
    where = wrap(arg(node, 2 if node.target is aten.topk.default else 1, "dim", -1), len(dims))
    out = []
    for value in node.meta["val"]:
        rest = [*dims[:where], *dims[where + 1 :]]
        if value.ndim == len(dims):
            rest.insert(where, fresh(size_of(value.shape[where])))
        out.append(rest)
    return out


def like_index(ctx: Context, node: Node) -> Dims:
    """gather: the result has the dimensions of the index."""
    return list(ctx.of(node.args[2]))


def repeated(ctx: Context, node: Node) -> Dims:
    """repeat_interleave by a number: each index of a dimension that many times."""
    dims = list(ctx.of(node.args[0]))
    dim = arg(node, 2, "dim")
    if dim is None or not isinstance(node.args[1], int):
        return [fresh(s) for s in shape(node)]
    where = wrap(dim, len(dims))
    dims[where] = (*resolve(dims[where]), *fresh(node.args[1]))
    return dims


def tiled(ctx: Context, node: Node) -> Dims:
    """repeat: each dimension as a whole that many times."""
    dims, times = ctx.of(node.args[0]), list(node.args[1])
    dims = [()] * (len(times) - len(dims)) + list(dims)
    counts = [size_of(t.meta["val"] if isinstance(t, Node) else t) for t in times]
    return [(*fresh(count), *resolve(dim)) for dim, count in zip(dims, counts, strict=True)]


def source(ctx: Context, node: Node) -> Dims:
    """Operators that make a value from sizes alone."""
    return [fresh(s) for s in shape(node)]


def masked_scatter(ctx: Context, node: Node) -> Dims:
    """The splice: the mask aligns with the target; rows that are inserted [n, C] come in equal shares, one a batch row.

    That the shares are equal is an assumption, which an edit that makes use of it checks when the graph runs.
    """
    dims = list(ctx.of(node.args[0]))
    for one, other in zip(reversed(dims), reversed(ctx.of(node.args[1])), strict=False):
        ctx.unify(node, one, other)
    offered = picked_from(node.args[2])
    inserted = ctx.of(node.args[2] if offered is None else offered)
    if len(dims) == 3 and len(inserted) == 2:
        share = divide(product(resolve(inserted[0])), product(resolve(dims[0])))
        if share is not None and resolve(dims[0]):
            ctx.unify(node, inserted[0], (*resolve(dims[0]), *fresh(share)))
    return dims


def picked_from(node: Node) -> Node | None:
    """The rows [n, C] of which a value is those under a bool mask [n]; None for a value of another kind."""
    if node.target is not aten.index.Tensor or len(node.args[1]) != 1 or node.args[1][0] is None:
        return None
    mask = node.args[1][0].meta["val"]
    return node.args[0] if mask.dtype == torch.bool and mask.ndim == 1 else None


RULES: dict[Any, Callable[[Context, Node], Any]] = {operator.getitem: getitem}


def _register(rule: Callable[[Context, Node], Any], *names: str) -> None:
    for name in names:
        packet, _, overload = name.partition(".")
        found = getattr(aten, packet, None)
        for each in [overload] if overload else found.overloads() if found else []:
            RULES[getattr(found, each)] = rule


_register(
    pointwise,
    "where",
    "masked_fill",
    "masked_fill_",
    "dropout",
    "clamp",
    "pow",
    "add",
    "sub",
    "mul",
    "div",
    "bitwise_not",
    "__and__",
    "__or__",
    "__xor__",
    "rsub",
    "lerp",
    "floor_divide",
    "remainder",
    "maximum",
    "minimum",
)
_register(
    like_first,
    "to",
    "alias",
    "detach",
    "detach_",
    "clone",
    "contiguous",
    "lift_fresh_copy",
    "_to_copy",
    "softmax",
    "_softmax",
    "log_softmax",
    "cumsum",
    "triu",
    "tril",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "rand_like",
    "flip",
    "roll",
    "type_as",
    "float",
    "softplus",
    "alpha_dropout",
    "feature_dropout",
    "normal_",
    "_unsafe_masked_index",
    "gelu",
    "silu",
    "relu",
    "tanh",
    "sigmoid",
    "scatter",
    "scatter_",
    "index_fill",
    "fill",
)
_register(norm, "layer_norm", "rms_norm", "native_layer_norm.default")
_register(view, "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")
_register(linear, "linear")
_register(addmm, "addmm")
_register(matmul, "matmul", "bmm", "mm")
_register(attention, "scaled_dot_product_attention")
_register(transpose, "transpose", "t", "mT", "numpy_T", "swapaxes")
_register(permute, "permute")
_register(unsqueeze, "unsqueeze")
_register(squeeze, "squeeze")
_register(select, "select.int")
_register(slice_, "slice.Tensor")
_register(cat, "cat", "concat")
_register(stack, "stack")
_register(pieces, "split", "split_with_sizes", "chunk", "unbind")
_register(expand, "expand", "broadcast_to", "expand_as")
_register(repeated, "repeat_interleave.self_int")
_register(tiled, "repeat")
_register(chosen, "topk", "max.dim", "min.dim")
_register(ordered, "sort")
_register(numbered, "argsort")
_register(written, "index_put", "index_put_")
_register(like_second, "copy_")
_register(reduce, "sum", "mean", "amax", "amin", "any", "all", "prod", "argmax", "argmin", "var", "std", "logsumexp")
_register(embedding, "embedding")
_register(index, "index.Tensor")
_register(like_index, "gather")
_register(
    source,
    "arange",
    "full",
    "zeros",
    "ones",
    "empty",
    "rand",
    "randn",
    "scalar_tensor",
    "eye",
    "linspace",
    "new_ones",
    "new_zeros",
    "new_full",
    "new_empty",
    "histc",
)
_register(conv, "conv1d", "conv2d", "conv3d", "convolution.default")
_register(masked_scatter, "masked_scatter")
_register(windows, "avg_pool2d", "im2col")
_register(resampled, "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "adaptive_avg_pool2d")

_register(einsum, "einsum")
_register(grouped, "_grouped_mm", "_scaled_grouped_mm")

NAMED: dict[str, Callable[[Context, Node], Any]] = {"grouped_mm_fallback": grouped}
"""Operators of other libraries, by name: their packages may be absent."""
