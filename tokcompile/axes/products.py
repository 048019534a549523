"""Axis rules of operators that contract: matrix products, attention, convolutions."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes.atoms import Dim, fresh, product, same
from tokcompile.axes.context import Context, Dims, arg, shape

aten = torch.ops.aten


def linear(ctx: Context, node: Node) -> Dims:
    """[..., in] x [out, in] -> [..., out]."""
    left, weight = ctx.of(node.args[0]), ctx.of(node.args[1])
    ctx.unify(node, left[-1], weight[-1])
    return [*left[:-1], *weight[:-1]]


def addmm(ctx: Context, node: Node) -> Dims:
    """[n, k] x [k, m] plus a broadcast term."""
    left, right = ctx.of(node.args[1]), ctx.of(node.args[2])
    ctx.unify(node, left[-1], right[0])
    return [left[0], right[1]]


def matmul(ctx: Context, node: Node) -> Dims:
    """Batched matrix product with broadcast leading dimensions."""
    left, right = ctx.of(node.args[0]), ctx.of(node.args[1])
    if len(left) == 1 or len(right) == 1:
        ctx.unify(node, left[-1], right[-2] if len(right) > 1 else right[0])
        return [*left[:-1], *(right[:-2] if len(right) > 1 else []), *(right[-1:] if len(right) > 1 else [])]
    ctx.unify(node, left[-1], right[-2])
    rank = max(len(left), len(right)) - 2
    batch: Dims = []
    for offset in range(rank, 0, -1):
        pair = [dims[-2 - offset] for dims in (left, right) if len(dims) >= 2 + offset]
        pair = [dim for dim in pair if dim] or [()]
        for other in pair[1:]:
            ctx.unify(node, pair[0], other)
        batch.append(pair[0])
    return [*batch, left[-2], right[-1]]


def attention(ctx: Context, node: Node) -> Dims:
    """Fused attention: key tokens align with value tokens, mask rows with queries, mask columns with keys."""
    query, key, value = (ctx.of(a) for a in node.args[:3])
    ctx.unify(node, query[-1], key[-1])
    ctx.unify(node, key[-2], value[-2])
    for position in range(len(query) - 2):
        if same(product(query[position]), product(key[position])):
            ctx.unify(node, query[position], key[position])
        ctx.unify(node, key[position], value[position])
    mask = ctx.of(arg(node, 3, "attn_mask"))
    if node.target is not aten.scaled_dot_product_attention.default:  # the two-dimensional padding mask
        ctx.unify(node, mask[0], query[0])
        if mask and same(product(mask[-1]), product(key[-2])):
            ctx.unify(node, mask[-1], key[-2])
    elif mask:
        ctx.unify(node, mask[-1], key[-2])
        if len(mask) > 1:
            ctx.unify(node, mask[-2], query[-2])
        if len(mask) > 3:
            ctx.unify(node, mask[0], query[0])
    return [*query[:-1], value[-1]]


def conv(ctx: Context, node: Node) -> Dims:
    """Convolutions: the batch goes through, the output channels are the filter's."""
    sizes = shape(node)
    lead = len(sizes) - (len(ctx.of(node.args[1])) - 2) - 1
    return [*ctx.of(node.args[0])[:lead], ctx.of(node.args[1])[0], *(fresh(s) for s in sizes[lead + 1 :])]


def grouped(ctx: Context, node: Node) -> Dims:
    """[n, in] x [groups, in, out] -> [n, out]: consecutive rows by the matrix of their group."""
    left, weight = ctx.of(node.args[0]), ctx.of(node.args[1])
    if len(left) != 2 or len(weight) != 3:
        return [fresh(size) for size in shape(node)]
    ctx.unify(node, left[-1], weight[-2])
    return [left[0], weight[-1]]


def einsum(ctx: Context, node: Node) -> Dims:
    """Dimensions of one letter align; the result has those that stand right of the arrow."""
    sizes = shape(node)
    given, arrow, result = node.args[0].replace(" ", "").partition("->")
    if not arrow or "." in given:
        return [fresh(size) for size in sizes]
    letters: dict[str, Dim] = {}
    for names, value in zip(given.split(","), node.args[1], strict=True):
        for name, dim in zip(names, ctx.of(value), strict=True):
            if letters.get(name):
                ctx.unify(node, letters[name], dim)
            letters[name] = letters.get(name) or dim
    return [letters[name] or fresh(size) for name, size in zip(result, sizes, strict=True)]
