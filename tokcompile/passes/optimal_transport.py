"""Merge tokens into those of a selection by optimal transport."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import product, resolve
from tokcompile.editing.edit import length_value, sub
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, Selection
from tokcompile.passes.merging import Merging
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence
from tokcompile.sites.grid import patch_grid
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


def merge_by_transport(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Pour all tokens into those of the step's selection, which stay where they are."""
    selection = ctx.values[step.keep]
    grid = _grid(ctx, selection, place, at)
    if length_value(selection.size) == length_value(selection.count):
        return None
    call, node = ctx.editor.call, place.node
    others = ctx.editor.arithmetic(sub, selection.size, selection.count)
    index = call(tokred.kept_indices.default, selection.mask, selection.count)

    def content(source: Node) -> Node:
        # From the map and not from the selection: a replayed map then needs no scores.
        keep = call(aten.scatter.value, call(aten.zeros_like.default, selection.mask), 1, source, True)
        rest = call(tokred.kept_indices.default, call(aten.logical_not.default, keep), others)
        kept, gone = (call(tokred.gather_tokens.default, node, each, 1, 0) for each in (source, rest))
        cost = call(tokred.transport_cost.default, kept, gone, source, rest, *grid, float(step.distance))
        plan = call(tokred.transport_plan.default, cost, float(step.temperature), int(step.iterations))
        weights = call(tokred.transport_weights.default, plan, keep, None, step.marginals)
        if step.hard:
            nearest = call(tokred.nearest_tokens.default, node, source, None)
            whole = call(tokred.merge_weights.default, nearest, source, "average")
            weights = call(aten.lerp.Scalar, weights, whole, float(step.hard))
        return call(tokred.mix_tokens.default, node, source, weights, name="merged")

    return Merging(index, selection.count, content)


def _grid(ctx: Context, selection: Selection, place: Place, at: Sequence) -> tuple[int, int]:
    """The patch grid that the tokens of a place and of a selection are, all of them."""
    grid = patch_grid(ctx.program, at.axis)
    if resolve(selection.axis) == resolve(at.axis) and selection.group is None and grid is not None:
        return grid
    raise EditError(
        "transport needs the patches of a grid, all of them, and a selection among these",
        where=[place.address],
        found=f"{product(resolve(at.axis))} tokens at the place, a selection among {length_value(selection.size)}",
        remedy="select image tokens of the vision stack and merge at projector.output, before tokens are dropped",
    )
