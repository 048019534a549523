"""Axis rules of the operators that merge tokens: which old tokens a new one is made of, and its content."""

from __future__ import annotations

from torch.fx import Node

from tokcompile.axes.atoms import fresh, resolve
from tokcompile.axes.context import Context, Dims, shape


def representatives(ctx: Context, node: Node) -> Dims:
    """tokred::strided_tokens and first_members: a new axis that remembers the axis whose tokens stand for it."""
    batch, old = ctx.of(node.args[0])[:2]
    made = fresh(shape(node)[1])
    if made:
        made[0].origin, made[0].via = resolve(old), node
    return [batch, made]


def nearest(ctx: Context, node: Node) -> Dims:
    """tokred::nearest_tokens: a number for each token of the keys."""
    keys, source, among = (ctx.of(value) for value in node.args[:3])
    ctx.unify(node, keys[0], source[0])
    for one, other in zip(keys, among, strict=False):
        ctx.unify(node, one, other)
    return list(keys[:2])


def merge_weights(ctx: Context, node: Node) -> Dims:
    """tokred::merge_weights: old tokens against new ones."""
    assigned, source = (ctx.of(value) for value in node.args[:2])
    ctx.unify(node, assigned[0], source[0])
    return [assigned[0] or source[0], source[1], assigned[1]]


def mix_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::mix_tokens: the tokens of a value become those of the token map."""
    value, source, weights = (ctx.of(each) for each in node.args[:3])
    ctx.unify(node, weights[1], source[1])
    ctx.unify(node, weights[2], value[1])
    for other in (source[0], weights[0]):
        ctx.unify(node, value[0], other)
    return [value[0] or source[0] or weights[0], source[1], value[2]]


def pool_matrix(ctx: Context, node: Node) -> Dims:
    """tokred::pool_matrix: the places of one grid against those of another, whatever they turn out to be."""
    return [fresh(size) for size in shape(node)]
