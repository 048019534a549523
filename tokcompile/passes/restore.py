"""Give outputs that hold merged tokens their old length back."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, resolve
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.steps import Merge

tokred = torch.ops.tokred


def restore(ctx: Context, inverse: Node | None, axis: Dim, step: Merge) -> None:
    """Give the model's outputs that hold merged tokens their old length back.

    Raises:
        EditError: no output holds them, or an old token is in several new ones.
    """
    if inverse is None:
        raise EditError(f"tokens merged by {step.by} cannot be told apart again", remedy="leave `restore` out")
    output, found = ctx.program.output, False
    with ctx.editor.before(output):
        for value in dict.fromkeys(output.all_input_nodes):
            spots = [i for i, dim in enumerate(ctx.program.axes.of(value)) if dim == resolve(axis)]
            if spots:
                found = True
                whole = ctx.editor.call(tokred.gather_tokens.default, value, inverse, spots[0], 0)
                ctx.editor.swap_input(output, value, whole)
    if not found:
        raise EditError(
            "no output of the model holds the merged tokens",
            where=[step.at],
            found="a result for all tokens in one, or for those of another sequence",
            remedy="leave `restore` out",
        )
    ctx.refresh()
