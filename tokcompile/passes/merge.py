"""merge: make fewer tokens of those of a sequence, each a combination of old ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.edit import Length, length_value
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.pairs import merge_pairs
from tokcompile.passes.restore import restore
from tokcompile.program import place as node_place
from tokcompile.sites import Place, resolve_address
from tokcompile.sites.features import Sequence, sequence
from tokcompile.steps import Merge
from tokcompile.tokenmap import map_of
from tokcompile.transport import Transport

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class Merging:
    """How the tokens at a place become fewer.

    Attributes:
        index: int64 [B, T'], an old token that each new one stands for, no two of a row alike.
        new: T'.
        content: makes the new tokens [B, T', C], given the token map's source.
        inverse: int64 [B, T], the new token that holds each old one; None where old tokens are in several.
    """

    index: Node
    new: Length
    content: Callable[[Node], Node]
    inverse: Node | None = None


METHODS: dict[str, Callable[[Context, Merge, Place, Sequence], Merging]] = {}
"""By the name that `by:` has, what makes a merging of a value [B, T, C]; nodes are inserted after that value."""


def merge(ctx: Context, step: Merge) -> None:
    """Replace the tokens at the step's address by fewer; one that keeps all leaves the graph as it is."""
    if step.by == "pairs":
        merge_pairs(ctx, step)
        return
    place = resolve_address(ctx.sites, step.at)
    at = rows_of_tokens(ctx, place.node)
    with ctx.editor.after([place.node]):
        made = METHODS[step.by](ctx, step, place, at)
        like = ctx.editor.call(aten.select.int, place.node, -1, 0)
        old = ctx.editor.size(place.node, at.dim)
        token_map = map_of(ctx.editor, made.index, like, at, old, made.new, step.positions)
        content = made.content(token_map.source)
    ctx.log.append(
        {
            "verb": "merge",
            "at": step.at,
            "by": step.by,
            "from": str(length_value(old)),
            "to": str(length_value(made.new)),
        }
    )
    Transport(ctx.editor, ctx.sites).apply(place.node, token_map, content)
    ctx.refresh()
    if step.restore:
        restore(ctx, made.inverse, ctx.program.axes.of(token_map.source)[1], step)


def rows_of_tokens(ctx: Context, node: Node) -> Sequence:
    """The sequence of a value [B, T, C].

    Raises:
        EditError: the value has another form.
    """
    at = sequence(ctx.program, ctx.sites, node)
    if at is None or at.packed or node.meta["val"].ndim != 3:
        raise EditError(
            "tokens can be merged in a value [B, T, C]",
            where=[node_place(node)],
            found=f"{tuple(node.meta['val'].shape)}",
            remedy="merge further down, where each row of the batch has its own tokens",
        )
    return at
