"""Put merged tokens in the place of those that they stand for, and leave all others as they were."""

from __future__ import annotations

import torch

from tokcompile.editing.tokenmap import note
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.merging import Merging
from tokcompile.program import place as node_place
from tokcompile.sites import Place

aten = torch.ops.aten
tokred = torch.ops.tokred


def write_back(ctx: Context, place: Place, made: Merging) -> None:
    """Let the model go on with a value [B, T, C] in which the merged tokens stand at their places.

    No axis changes, so what earlier steps chose and scored stays valid. What rules computed of the value before goes on
    reading it as it was.

    Raises:
        EditError: the value is not [B, T, C], or the model reads it before the tokens are chosen.
    """
    node, call = place.node, ctx.editor.call
    if node.meta["val"].ndim != 3:
        raise EditError(
            "tokens are written back to a value [B, T, C]",
            where=[node_place(node)],
            found=f"{tuple(node.meta['val'].shape)}",
            remedy="merge at projector.patches",
        )
    readers = [user for user in node.users if "tokred" not in user.meta.get("custom", {})]
    like = call(aten.select.int, node, -1, 0)
    source = call(tokred.token_source.default, made.index, like, name="source")
    note(ctx.editor, source)
    wide = call(aten.expand.default, call(aten.unsqueeze.default, source, -1), [-1, -1, node.meta["val"].shape[-1]])
    whole = call(aten.scatter.src, node, 1, wide, made.content(source), name="written_back")
    for user in readers:
        if user._sort_key < whole._sort_key:
            raise EditError(
                "tokens would be merged before they are chosen",
                where=[node_place(user)],
                found="the scores are computed after the place of the merge",
                remedy="merge later, or score earlier",
            )
        ctx.editor.swap_input(user, node, whole)
    ctx.renew()
