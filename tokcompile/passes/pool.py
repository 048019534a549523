"""Merge the cells of a grid to those of a smaller one."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.merging import Merging, tokens_of_images
from tokcompile.program import place as node_place
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence
from tokcompile.sites.grid import patch_grid
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


def pool(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Average the grid's cells to as many rows and columns as the step asks for; a bin stands for its first cell.

    Returns:
        None where the grid has no more rows and columns than these.
    """
    tokens_of_images(ctx, place, at)
    grid = patch_grid(ctx.program, at.axis)
    if grid is None:
        raise EditError(
            "pooling needs the patch grid",
            where=[node_place(place.node)],
            found=f"a sequence of {' x '.join(str(atom.size) for atom in at.axis)} tokens without one",
            remedy="pool at projector.input, before tokens are dropped, with class tokens left out",
        )
    rows = int(step.rows)
    columns = rows if step.columns is None else int(step.columns)
    smaller = min(rows, grid[0]), min(columns, grid[1])
    if smaller == grid:
        return None
    editor = ctx.editor
    weights = editor.call(tokred.pool_matrix.default, place.node, *grid, *smaller)
    first = editor.call(aten.argmax.default, weights, 2)
    index = editor.call(aten.expand.default, first, [editor.size(place.node, 0), -1])

    def content(source: Node) -> Node:
        return editor.call(tokred.mix_tokens.default, place.node, source, weights, name="merged")

    return Merging(index, smaller[0] * smaller[1], content)
