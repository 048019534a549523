"""merge: make fewer tokens of those of a sequence, each a combination of old ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch.fx import Node

from tokcompile.counts import images_per_row
from tokcompile.editing.edit import length_value
from tokcompile.editing.tokenmap import map_of
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.passes.clips import merge_clips
from tokcompile.passes.context import Context
from tokcompile.passes.density_peaks import merge_by_density
from tokcompile.passes.drop import check_positions
from tokcompile.passes.keymerge import merge_keys
from tokcompile.passes.kmeans import kmeans
from tokcompile.passes.merging import Merging, tokens_of_images
from tokcompile.passes.nearest import nearest
from tokcompile.passes.optimal_transport import merge_by_transport
from tokcompile.passes.pairs import merge_pairs
from tokcompile.passes.pool import pool
from tokcompile.passes.restore import restore
from tokcompile.passes.super_tokens import attend_to_super_tokens
from tokcompile.passes.writeback import write_back
from tokcompile.program import place as node_place
from tokcompile.sites import Place, resolve_address
from tokcompile.sites.features import Sequence, features, find_shuffle, sequence
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred
METHODS: dict[str, Callable[[Context, Merge, Place, Sequence], Merging | None]] = {
    "pool": pool,
    "nearest": nearest,
    "kmeans": kmeans,
    "transport": merge_by_transport,
    "clips": merge_clips,
    "density_peaks": merge_by_density,
}
"""By the name that `by:` has, what makes a merging of a value [B, T, C], or None to keep all; nodes are inserted after
that value."""


def merge(ctx: Context, step: Merge) -> None:
    """Replace the tokens at the step's address by fewer; one that keeps all leaves the graph as it is."""
    if step.by == "pairs":
        merge_pairs(ctx, step)
        return
    if step.by == "super_tokens":
        attend_to_super_tokens(ctx, step)
        return
    if step.of_caches:
        merge_keys(ctx, step)
        return
    place = resolve_address(ctx.sites, step.at)
    at = rows_of_tokens(ctx, place.node)
    if step.positions == "compact":
        check_positions(ctx, place)
    with ctx.editor.after([place.node, *_sources(ctx, step)]):
        rows = _by_row(ctx, place, at)
        made = METHODS[step.by](ctx, step, replace(place, node=rows), at)
        old = ctx.editor.size(rows, 1)
        record = {"verb": "merge", "at": step.at, "by": step.by, "from": str(length_value(old))}
        ctx.log.append(record)
        if made is None:
            record |= {"to": record["from"], "note": "everything is kept: no edit"}
            return
        if step.write_back:
            record |= {"to": record["from"], "note": f"{length_value(made.new)} are merged at their places"}
            write_back(ctx, place, made)
            return
        record["to"] = str(length_value(made.new))
        like = ctx.editor.call(aten.select.int, rows, -1, 0)
        token_map = map_of(ctx.editor, made.index, like, at, old, made.new, step.positions)
        token_map = replace(token_map, placed=made.placed)
        content = made.content(token_map.source)
        if at.packed:
            sizes = [*place.node.meta["val"].shape[: at.dim], -1, place.node.meta["val"].shape[-1]]
            content = ctx.editor.call(aten.reshape.default, content, sizes)
    Transport(ctx.editor, ctx.sites).apply(place.node, token_map, content)
    ctx.refresh()
    if step.restore:
        restore(ctx, made.inverse, ctx.program.axes.of(token_map.source)[1], step)


def _sources(ctx: Context, step: Merge) -> list[Node]:
    """What earlier steps made that this one reads."""
    made = [ctx.values[step.keep].mask] if step.keep else []
    return made + ([ctx.values[step.like].node] if step.like else [])


def _by_row(ctx: Context, place: Place, at: Sequence) -> Node:
    """A value as [B, T, C]."""
    if not at.packed:
        return place.node
    sizes = [-1, tokens_of_images(ctx, place, at), place.node.meta["val"].shape[-1]]
    return ctx.editor.call(aten.reshape.default, place.node, sizes)


def rows_of_tokens(ctx: Context, node: Node) -> Sequence:
    """The sequence of a value [B, T, C], or of the packed features [n, C] of rows with as many each.

    Raises:
        EditError: the value has another form.
    """
    at = sequence(ctx.program, ctx.sites, node) or _of_images(ctx, node)
    shuffled = at is not None and at.packed and find_shuffle(ctx.program, at.axis) is not None
    if at is None or shuffled or not (at.packed or node.meta["val"].ndim == 3):
        raise EditError(
            "tokens can be merged in a value [B, T, C], or in the packed features [n, C] of rows with as many each",
            where=[node_place(node)],
            found=f"{tuple(node.meta['val'].shape)}",
            remedy="merge further down, where each row of the batch has its own tokens",
        )
    return at


def _of_images(ctx: Context, node: Node) -> Sequence | None:
    """The features of images one after the other, one image a row, where the number of rows is not known before."""
    made, dims = features(ctx.program, ctx.sites), ctx.program.axes.of(node)
    if made is None or made.packed or ctx.sites.projector is None or ctx.sites.splice is None or len(dims) != 2:
        return None
    images, axis = dims[0][: -len(made.axis)], dims[0][-len(made.axis) :]
    if not images or axis != made.axis or images_per_row(ctx.sites.projector.input, ctx.sites.splice.node) != 1:
        return None
    return Sequence(images, axis, 0, packed=True)
