"""merge: make fewer tokens of those of a sequence, each a combination of old ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from tokcompile.axes import product
from tokcompile.edit import Length, length_value
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.drop import check_positions
from tokcompile.passes.pairs import merge_pairs
from tokcompile.passes.restore import restore
from tokcompile.passes.super_tokens import attend_to_super_tokens
from tokcompile.program import place as node_place
from tokcompile.sites import Place, resolve_address
from tokcompile.sites.features import Sequence, find_shuffle, sequence
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
        placed: int64 [B, T'], where new tokens take their positions from, if that is not `index`.
    """

    index: Node
    new: Length
    content: Callable[[Node], Node]
    inverse: Node | None = None
    placed: Node | None = None


METHODS: dict[str, Callable[[Context, Merge, Place, Sequence], Merging | None]] = {}
"""By the name that `by:` has, what makes a merging of the place's value [B, T, C]; None where all tokens stay.

Packed features are brought to rows before. Nodes are inserted after that value, and after the selection of the step.
"""


def merge(ctx: Context, step: Merge) -> None:
    """Replace the tokens at the step's address by fewer; one that keeps all leaves the graph as it is."""
    if step.by == "pairs":
        merge_pairs(ctx, step)
        return
    if step.by == "super_tokens":
        attend_to_super_tokens(ctx, step)
        return
    place = resolve_address(ctx.sites, step.at)
    at = rows_of_tokens(ctx, place.node)
    if step.positions == "compact":
        check_positions(ctx, place)
    chosen = [ctx.values[step.keep].mask] if step.keep else []
    record = {"verb": "merge", "at": step.at, "by": step.by}
    ctx.log.append(record)
    with ctx.editor.after([place.node, *chosen]):
        wide = _by_row(ctx, place.node, at)
        made = METHODS[step.by](ctx, step, replace(place, node=wide), at)
        if made is None:
            record["note"] = "everything is kept: no edit"
            return
        like = ctx.editor.call(aten.select.int, wide, -1, 0)
        old = ctx.editor.size(wide, 1)
        token_map = map_of(ctx.editor, made.index, like, at, old, made.new, step.positions)
        token_map = replace(token_map, placed=made.placed)
        content = _as_it_was(ctx, made.content(token_map.source), place.node, at)
    record |= {"from": str(length_value(old)), "to": str(length_value(made.new))}
    Transport(ctx.editor, ctx.sites).apply(place.node, token_map, content)
    ctx.refresh()
    if step.restore:
        restore(ctx, made.inverse, ctx.program.axes.of(token_map.source)[1], step)


def rows_of_tokens(ctx: Context, node: Node) -> Sequence:
    """The sequence of a value [B, T, C], or of one that packs the tokens of rows with as many each.

    Raises:
        EditError: the value has another form.
    """
    at = sequence(ctx.program, ctx.sites, node)
    packed = at is not None and at.packed and find_shuffle(ctx.program, at.axis) is None
    if packed or (at is not None and not at.packed and node.meta["val"].ndim == 3):
        return at
    raise EditError(
        "tokens can be merged in a value [B, T, C], or in the packed features [n, C] of rows with as many each",
        where=[node_place(node)],
        found=f"{tuple(node.meta['val'].shape)}",
        remedy="merge further down, where each row of the batch has its own tokens",
    )


def _by_row(ctx: Context, node: Node, at: Sequence) -> Node:
    """A value as [B, T, C], one row of a text each where features are packed."""
    if not at.packed:
        return node
    return ctx.editor.call(aten.reshape.default, node, [-1, product(at.axis), node.meta["val"].shape[-1]])


def _as_it_was(ctx: Context, content: Node, node: Node, at: Sequence) -> Node:
    """New tokens [B, T', C], packed where the old ones were."""
    if not at.packed:
        return content
    flat = ctx.editor.call(aten.flatten.using_ints, content, 0, 1)
    return ctx.editor.call(aten.unsqueeze.default, flat, 0) if node.meta["val"].ndim == 3 else flat
