"""place, by per_image: close the gaps within each image, and let text stand where it stood."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import product
from tokcompile.passes.context import Context, oldest
from tokcompile.passes.turned import refuse_fractions
from tokcompile.passes.variable import visual
from tokcompile.rope.tables import Tables, angles_of, inverse_of, rows_of
from tokcompile.sites.features import features
from tokcompile.sites.turns import Frequencies, Turn
from tokcompile.steps import Place

aten = torch.ops.aten
tokred = torch.ops.tokred


def place_per_image(ctx: Context, step: Place, found: list[Frequencies], record: dict[str, object]) -> None:
    """Number the tokens that are left of each image from the image's own start on.

    Later steps are text and have the positions that they would have had: nothing is handed on to them.

    Raises:
        EditError: positions count in time, height and width; or there are no images.
    """
    if ctx.sites.phase != "prefill":
        record["note"] = "text keeps its positions: no edit"
        return
    size = _size(ctx)
    for each in found:
        refuse_fractions(ctx, each, step.at)
        with ctx.editor.before(each.turns[0].node):
            positions, seen = rows_of(ctx.editor, each), visual(ctx, each)
            rows = ctx.editor.call(aten.expand.default, positions, [ctx.editor.size(seen, 0), -1])
            starts = ctx.editor.call(tokred.image_starts.default, rows, seen, size)
            inverse = inverse_of(ctx.editor, each)
        for turns in _by_tokens(each.turns):
            _give(ctx, each, turns, rows, starts, inverse)


def _give(ctx: Context, each: Frequencies, turns: list[Turn], rows: Node, starts: Node, inverse: Node) -> None:
    """Tables of the tokens that some layers hold."""
    with ctx.editor.before(turns[0].node):
        for source in turns[0].via:
            fresh = source.args[0] if source.target is tokred.inserted_source.default else None
            rows, starts = (ctx.editor.call(tokred.gather_tokens.default, v, source, 1, 0) for v in (rows, starts))
            if fresh is not None:
                starts = ctx.editor.call(aten.masked_fill.Scalar, starts, fresh, -1)
        angles = angles_of(ctx.editor, ctx.editor.call(tokred.close_gaps.default, rows, starts), inverse)
    Tables(ctx.editor, angles, passed=len(turns[0].via)).give(turns)


def _by_tokens(turns: list[Turn]) -> list[list[Turn]]:
    """Products that hold the same tokens together, in their order."""
    groups: dict[tuple[Node, ...], list[Turn]] = {}
    for turn in turns:
        groups.setdefault(turn.via, []).append(turn)
    return list(groups.values())


def _size(ctx: Context) -> int:
    """How many tokens an image had at first; 0 where that is not known."""
    made = features(ctx.program, ctx.sites)
    size = product(oldest(made.axis)) if made is not None else 0
    return size if isinstance(size, int) else 0
