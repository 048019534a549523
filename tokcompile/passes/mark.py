"""mark: put one token in place of each run of tokens that a selection did not choose, from an address on."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import resolve
from tokcompile.counts import images_per_row
from tokcompile.editing.capacity import expected_runs, markers
from tokcompile.editing.edit import Length, length_value
from tokcompile.editing.hiding import Hiding
from tokcompile.editing.tokenmap import TokenMap, marked_map
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, Selection
from tokcompile.passes.drop import stays
from tokcompile.passes.select import is_text_axis
from tokcompile.program import place as node_place
from tokcompile.sites import Place, resolve_address
from tokcompile.sites.features import Sequence, features, sequence
from tokcompile.sites.features import images_per_row as packed_images
from tokcompile.sites.sight import find_sight
from tokcompile.steps import Mark

aten = torch.ops.aten
tokred = torch.ops.tokred
_NAME = "marker"


def mark(ctx: Context, step: Mark) -> None:
    """Replace runs at the step's address; a selection of everything leaves the graph as it is.

    The number of runs depends on the data. The new sequence has slots for as many as there can be, and ends at the
    last slot: those in front that a row does not fill are hidden from attention, in this graph and in all that
    continue its caches.
    """
    place, selection = resolve_address(ctx.sites, step.at), ctx.values[step.keep]
    at = _sequence(ctx, place, selection)
    with ctx.editor.after([place.node, selection.mask]):
        keep, gone = stays(ctx, place, selection, at)
        old, kept = ctx.editor.size(place.node, at.dim), _kept(ctx, place, selection)
        spans, shortest = _spans(ctx, step), int(step.min_run)
        slots = ctx.editor.arithmetic(
            lambda total, away, stay: total - away + markers(stay + spans, away, shortest), old, gone, kept
        )
        ctx.log.append(_record(step, spans, *map(length_value, (old, gone, kept, slots))))
        if isinstance(gone, int) and gone == 0:
            ctx.log[-1]["note"] = "everything is kept: no edit"
            return
        _check_sight(ctx, place)
        held = _content(ctx, step, place, at)
        token_map = marked_map(ctx.editor, _runs(ctx, step, keep, gone), at, old, slots)
        if shortest == 1:
            _slots(token_map).meta["kept"] = kept
        if step.content == "run_mean":
            held = ctx.editor.call(tokred.slot_means.default, place.node, _slots(token_map))
        content = ctx.editor.call(tokred.mark_tokens.default, place.node, _slots(token_map), held)
    Transport(ctx.editor, ctx.sites).apply(place.node, token_map, content)
    ctx.refresh()
    _hide(ctx, token_map)


def _slots(token_map: TokenMap) -> Node:
    return token_map.source.args[0]


def _sequence(ctx: Context, place: Place, selection: Selection) -> Sequence:
    """The sequence at a place.

    Raises:
        EditError: it is no text with images, or the selection is among other tokens than those of images.
    """
    at = sequence(ctx.program, ctx.sites, place.node)
    if ctx.sites.splice is None or at is None or at.packed or not is_text_axis(ctx, at.axis):
        raise EditError(
            "markers stand for image tokens in a text",
            where=[node_place(place.node)],
            found="no splice of image features" if ctx.sites.splice is None else f"{place.node.meta['val'].shape}",
            remedy="call the model with an image; tokens of other models can be dropped or merged",
        )
    if is_text_axis(ctx, selection.axis) and selection.kind != "image":
        raise EditError(
            "markers stand for image tokens, and the selection is among others too",
            where=[place.address],
            found=f"a selection among {selection.kind} tokens: padding is among those",
            remedy="select among image",
        )
    if ctx.marks(at.axis):
        raise EditError(
            "an earlier mark has put markers into this sequence",
            where=[place.address],
            found="a second mark: its markers would stand for markers",
            remedy="mark once, or drop tokens after the mark",
        )
    return at


def _runs(ctx: Context, step: Mark, keep: Node, gone: Length) -> Node:
    """bool [B, T]: the tokens that are replaced. Every row must have as many that are not kept as the slots allow."""
    runs = ctx.editor.call(aten.logical_not.default, keep)
    count = ctx.editor.call(aten.sum.dim_IntList, runs, [1])
    ctx.editor.require(
        ctx.editor.call(aten.eq.Scalar, count, gone), "batch rows hold different numbers of image tokens"
    )
    if step.min_run > 1:
        runs = ctx.editor.call(tokred.long_runs.default, runs, step.min_run)
    return runs


def _spans(ctx: Context, step: Mark) -> int:
    """Stretches of image tokens between text in a row, at most: one an image, if the rule does not say."""
    if step.spans:
        return int(step.spans)
    splice, projector = ctx.sites.splice, ctx.sites.projector
    made = features(ctx.program, ctx.sites)
    if made is not None and made.packed:
        return packed_images(ctx.program, ctx.sites, made) or 1
    if projector is not None and projector.rows:
        return images_per_row(projector.input, splice.node)
    return images_per_row(splice.features, splice.node) if splice.features.meta["val"].ndim > 2 else 1


def _kept(ctx: Context, place: Place, selection: Selection) -> Length:
    """Image tokens of a row that stay."""
    images = 1 if is_text_axis(ctx, selection.axis) else images_per_row(selection.mask, place.node)
    return ctx.editor.arithmetic(lambda n: n * images, selection.count)


def _record(step: Mark, spans: int, old: Any, gone: Any, kept: Any, slots: Any) -> dict[str, Any]:
    """What the step did, for reports: the slots, and how many of them hold tokens."""
    record = {
        "verb": "mark",
        "at": step.at,
        "keep": step.keep,
        "content": step.content,
        "from": str(old),
        "to": str(slots),
    }
    if all(isinstance(n, int) for n in (old, gone, kept)) and gone and int(step.min_run) == 1:
        mean = float(old - gone + expected_runs(kept, gone, spans))
        record["filled"] = f"{old - gone + 1} to {slots}, {mean:.1f} by a random choice"
    return record


def _content(ctx: Context, step: Mark, place: Place, at: Sequence) -> Node | None:
    """What markers hold, whichever runs they stand for: [C] or [B, C]; None for zeros and for means of runs."""
    editor, node = ctx.editor, place.node
    if step.content == "mean":
        return editor.call(tokred.masked_mean.default, node, ctx.image_mask(at.axis))
    width, like = node.meta["val"].shape[-1], node.meta["val"]
    if step.content == "vector":
        make = lambda: torch.zeros(width, dtype=like.dtype, device=like.device)  # noqa: E731
        return editor.parameter(_NAME, (width,), make)
    return _embedded(ctx, step, place) if step.content == "row" else None


def _embedded(ctx: Context, step: Mark, place: Place) -> Node:
    """[C]: a row of the table of embeddings, as the model reads it."""
    table = ctx.sites.embedding.args[0] if ctx.sites.embedding is not None else None
    shape = tuple(table.meta["val"].shape) if table is not None else None
    if shape is None or shape[1] != place.node.meta["val"].shape[-1] or not 0 <= int(step.row) < shape[0]:
        raise EditError(
            f"the embedding of token {step.row} cannot be a marker",
            where=[place.address],
            found="no table of embeddings" if shape is None else f"a table {shape}",
            remedy="the number of a token of the model, or another content",
        )
    if _scaled(ctx.sites.embedding):
        raise EditError(
            "the embedding of a token cannot be a marker where the model scales its embeddings",
            where=[node_place(ctx.sites.embedding)],
            remedy="use `content: vector`, with the embedding times the factor as its value",
        )
    return ctx.editor.call(aten.select.int, table, 0, int(step.row))


def _scaled(embedding: Node) -> bool:
    return any(user.target in (aten.mul.Tensor, aten.div.Tensor) for user in embedding.users)


def _check_sight(ctx: Context, place: Place) -> None:
    """Refuse windows: what of a window's cache is empty, a later step cannot tell."""
    following = [
        block
        for block in ctx.sites.stacks[place.owner].blocks
        if ctx.sites.reach.above(place.node, block.attention.node)
    ]
    for block in {(block.attention.mask, block.attention.is_causal): block for block in following}.values():
        sight = find_sight(block.attention, ctx.sites.reach)
        if sight is not None and sight.window is not None:
            raise EditError(
                "markers cannot stand where attention has a window",
                where=[node_place(block.attention.node)],
                found=f"a window of {sight.window} tokens",
                remedy="use a drop step",
            )


def _hide(ctx: Context, token_map: TokenMap) -> None:
    """Hide empty slots from attention, and say in caches which slots are empty: these and the caller's padding."""
    axes, editor = ctx.program.axes, ctx.editor
    axis = resolve(axes.of(token_map.source)[1])
    sites = [s for s in ctx.sites.attentions if resolve(axes.of(s.key)[-1 if s.key_transposed else -2]) == axis]
    outputs = [n for n in dict.fromkeys(ctx.program.output.all_input_nodes) if _is_cache(ctx, n, axis)]
    Hiding(editor, ctx.sites.reach, token_map.filled).apply(sites)
    if outputs:
        with editor.before(ctx.program.output):
            real = ctx.valid_mask(axis)
            for node in outputs:
                editor.swap_input(ctx.program.output, node, editor.call(tokred.clear_slots.default, node, real))
    ctx.refresh()


def _is_cache(ctx: Context, node: Node, axis: Any) -> bool:
    """Whether an output is keys or values [B, H, T, D] of a marked sequence."""
    value, dims = node.meta.get("val"), ctx.program.axes.of(node)
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point() and dims[2] == axis
