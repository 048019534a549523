"""place, by compact: number the tokens that are left."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.turned import keep_offset, offset, refuse_fractions
from tokcompile.program import place as node_place
from tokcompile.rope.tables import Tables, angles_of, coordinates_of, heads_of, inverse_of
from tokcompile.sites.turns import Frequencies
from tokcompile.steps import Place

aten = torch.ops.aten
_NAME = "numbers"


def place_compact(ctx: Context, step: Place, found: list[Frequencies], record: dict[str, object]) -> None:
    """Number real tokens 0, 1, 2…, alike in time, height and width; padding in front of them has 0.

    Raises:
        EditError: some layers hold other tokens than others.
    """
    del record
    for each in found:
        refuse_fractions(ctx, each, step.at)
        if len({turn.via for turn in each.turns}) > 1:
            raise EditError(
                "some layers hold other tokens than others, and one numbering does not fit all",
                where=[node_place(each.turns[0].node)],
                remedy="use `positions: compact` in the drop step",
            )
        with ctx.editor.before(each.turns[0].node):
            inverse = inverse_of(ctx.editor, each)
            usual = ctx.editor.call(aten.select.int, coordinates_of(ctx.editor, each), 0, 0)
            if ctx.sites.phase == "prefill":
                numbers = _numbers(ctx, each)
            else:
                numbers = ctx.editor.call(aten.sub.Tensor, usual, offset(ctx, step.address.stack, _NAME))
            keep_offset(ctx, usual, numbers, _NAME)
            angles = angles_of(ctx.editor, numbers, inverse)
        Tables(ctx.editor, angles, passed=len(each.turns[0].via)).give(each.turns)


def _numbers(ctx: Context, frequencies: Frequencies) -> Node:
    """int64 [B or 1, T]."""
    turn = frequencies.turns[0]
    tokens = 3 - heads_of(turn)
    valid = ctx.valid_mask(ctx.program.axes.of(turn.value)[tokens])
    if valid is None:
        size = ctx.editor.size(turn.value, tokens)
        index = ctx.editor.call(aten.arange.default, size, device=turn.value.meta["val"].device)
        return ctx.editor.call(aten.unsqueeze.default, index, 0)
    count = ctx.editor.call(aten.cumsum.default, ctx.editor.call(aten.to.dtype, valid, torch.int64), 1)
    return ctx.editor.call(aten.clamp.default, ctx.editor.call(aten.sub.Tensor, count, 1), 0)
