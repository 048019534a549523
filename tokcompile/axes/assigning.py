"""Axis rules of the operators that share tokens out: by transport, around centres, and among cells of a grid."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes.atoms import fresh, resolve
from tokcompile.axes.context import Context, Dims, shape


def crossed(ctx: Context, node: Node) -> Dims:
    """tokred::transport_cost: one number for each pair of tokens of two values."""
    batch, kept, _ = ctx.of(node.args[0])
    return [batch, kept, ctx.of(node.args[1])[1]]


def weights(ctx: Context, node: Node) -> Dims:
    """tokred::transport_weights: one number for each new and each old token."""
    return [*ctx.of(node.args[0])[:2], ctx.of(node.args[1])[1]]


def batched(ctx: Context, node: Node) -> Dims:
    """Operators that make something new of each batch row."""
    return [ctx.of(node.args[0])[0], *(fresh(size) for size in shape(node)[1:])]


def centres(ctx: Context, node: Node) -> Dims:
    """tokred::density_peaks: a new axis that remembers the axis whose tokens stand for it."""
    batch, old = ctx.of(node.args[0])[:2]
    made = fresh(shape(node)[1])
    if made:
        made[0].origin, made[0].via = resolve(old), node
    return [batch, made]


def slots(ctx: Context, node: Node) -> Dims:
    """tokred::cluster_slots: so many numbers for each centre."""
    return [*ctx.of(node.args[1]), fresh(shape(node)[2])]


def super_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::super_token_pool: the cells of an affinity."""
    batch, _, width = ctx.of(node.args[0])
    return [batch, ctx.of(node.args[1])[1], width]


def spread(ctx: Context, node: Node) -> Dims:
    """tokred::super_token_spread: the tokens that the affinity was made of."""
    batch, _, width = ctx.of(node.args[0])
    affinity = node.args[1]
    made = affinity.target is torch.ops.tokred.super_token_affinity.default
    return [batch, ctx.of(affinity.args[0])[1] if made else fresh(shape(node)[1]), width]
