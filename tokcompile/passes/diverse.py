"""Choose tokens that are far from each other: each next one the farthest from those that were chosen before."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, Scores
from tokcompile.program import place
from tokcompile.sites.features import find_fold, sequence
from tokcompile.steps import Select

aten = torch.ops.aten
tokred = torch.ops.tokred


def compared_scores(ctx: Context, step: Select) -> Scores:
    """Stand-in scores for the tokens of a tapped value: one channel of each, which nobody reads.

    Raises:
        EditError: the value is not one token after the other.
    """
    tapped = ctx.values[step.like]
    at = sequence(ctx.program, ctx.sites, tapped.node)
    if at is None or tapped.node.meta["val"].ndim != (2 if at.packed else 3):
        raise EditError(
            "tokens are compared in a value [B, T, C], or in the packed features [n, C] of rows with as many each",
            where=[place(tapped.node)],
            found=f"{tuple(tapped.node.meta['val'].shape)}",
            remedy="tap the input or the output of a block",
        )
    first = ctx.editor.call(aten.select.int, _rows(ctx, step), -1, 0)
    return Scores(first, at.axis, tapped.owner)


def refuse_folds(ctx: Context, step: Select, patches: Dim) -> None:
    """Raise EditError where the tokens of a tapped value are patches that become features several at a time."""
    if find_fold(ctx.program, ctx.sites, patches) is not None:
        raise EditError(
            "several patches become one feature, and features are what is chosen",
            where=[place(ctx.values[step.like].node)],
            found=f"a tap of {product(resolve(patches))} patches",
            remedy="tap projector.input or projector.output",
        )


def _rows(ctx: Context, step: Select) -> Node:
    """The tapped value as [B, T, C]."""
    node = ctx.values[step.like].node
    at = sequence(ctx.program, ctx.sites, node)
    if not at.packed:
        return node
    return ctx.editor.call(aten.reshape.default, node, [-1, product(at.axis), node.meta["val"].shape[-1]])


def walk(ctx: Context, step: Select, scores: Scores, axis: Dim, group: Node | None, count: object) -> Node:
    """bool [B, T] on the axis that is chosen from: the tokens that the walk goes through.

    Args:
        scores: what `compared_scores` made.
        group: bool [B, T], tokens that are up for choice; None for all. Padding is not.
        count: how many are chosen of each row.
    """
    call = ctx.editor.call
    rows = ctx.align(_rows(ctx, step), scores.axis, axis)
    valid = ctx.valid_mask(axis)
    if valid is not None:
        group = valid if group is None else call(aten.logical_and.default, group, valid)
    distances = call(tokred.token_distances.default, rows)
    if step.scores is None:
        start = call(tokred.nearest_distance.default, distances, group)
    else:
        first = ctx.values[step.scores]
        start = ctx.align(first.node, first.axis, axis)
    return call(tokred.farthest_mask.default, distances, start, group, count)
