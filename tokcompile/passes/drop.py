"""drop: remove the tokens that a selection did not choose, from an address on."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.counts import images_per_row
from tokcompile.editing.edit import Length, length_value, sub
from tokcompile.editing.tokenmap import TokenMap, make_map
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, Selection, oldest
from tokcompile.passes.fold import folded_map
from tokcompile.passes.select import is_text_axis, patch_axis
from tokcompile.passes.turned import in_parts
from tokcompile.program import place as node_place
from tokcompile.sites import Place, resolve_address
from tokcompile.sites.features import Sequence, find_fold, sequence
from tokcompile.steps import Drop

aten = torch.ops.aten
tokred = torch.ops.tokred


def drop(ctx: Context, step: Drop) -> None:
    """Cut the sequence at the step's address; a selection of everything leaves the graph as it is."""
    place = resolve_address(ctx.sites, step.at)
    selection = ctx.values[step.keep]
    before, after = length_value(selection.size), length_value(selection.count)
    record = {
        "verb": "drop",
        "at": step.at,
        "keep": step.keep,
        "positions": step.positions,
        "from": str(before),
        "to": str(after),
    }
    ctx.log.append(record)
    if isinstance(before, int) and before == after:
        record["note"] = "everything is kept: no edit"
        return
    node = place.node
    at = sequence(ctx.program, ctx.sites, node)
    if at is None:
        raise EditError(
            "tokens can be dropped from a value [B, T, C], or from the packed patches [n, C] of rows with as many each",
            where=[node_place(node)],
            found=f"{tuple(node.meta['val'].shape)}",
        )
    if step.positions == "compact":
        check_positions(ctx, place)
    transport = Transport(ctx.editor, ctx.sites)
    with ctx.editor.after([node, selection.mask]):
        token_map = _map(ctx, step, place, selection, at)
    transport.apply(node, token_map)
    ctx.refresh()


def check_positions(ctx: Context, place: Place) -> None:
    """Only rotary positions can be renumbered: learned ones are already part of what a token carries.

    A vision sequence has no positions to renumber; dropping its features renumbers the text they are spliced into.
    """
    owner = place.owner
    if not owner or owner.startswith("vision"):
        text = ctx.sites.text_stack() if ctx.sites.splice is not None else None
        owner = text[0] if text is not None else None
    rotary = ctx.sites.rotary[owner] if owner else []
    if any(_several_coordinates(ctx, r.positions, ctx.sites.stacks[owner].blocks[0].input) for r in rotary):
        raise EditError(
            f"positions cannot be compacted: those of the {owner} have several coordinates",
            where=[place.address],
            found="an image's tokens stand in height and width, and do not count one by one",
            remedy="use `positions: keep`",
        )
    if any(in_parts(ctx, r.positions) for r in rotary):
        raise EditError(
            f"positions cannot be compacted: those of the {owner} are fractions",
            where=[place.address],
            found="tokens that a place step gave other positions",
            remedy="use `positions: keep`, or place tokens after the drop",
        )
    if not owner or rotary:
        return
    raise EditError(
        f"positions cannot be compacted: the {owner} has no rotary positions",
        where=[place.address],
        found="positions that are added to the embeddings, or none",
        remedy="use `positions: keep`",
    )


def _several_coordinates(ctx: Context, positions: Node, stream: Node) -> bool:
    """Whether positions have a dimension beside rows and tokens: one for time, height and width."""
    rows, tokens = (oldest(dim) for dim in ctx.program.axes.of(stream)[:2])
    return any(dim and oldest(dim) not in (rows, tokens) for dim in ctx.program.axes.of(positions))


def _map(ctx: Context, step: Drop, place: Place, selection: Selection, at: Sequence) -> TokenMap:
    editor, node, axis = ctx.editor, place.node, at.axis
    own = resolve(selection.axis) == resolve(axis)
    fold = None if own or is_text_axis(ctx, axis) else find_fold(ctx.program, ctx.sites, patch_axis(ctx, axis))
    if fold is not None and fold.features == resolve(selection.axis):
        return folded_map(ctx, selection, at, fold, step.positions)
    keep, gone = stays(ctx, place, selection, at)
    old = selection.size if at.packed else editor.size(node, at.dim)
    new = editor.arithmetic(sub, old, gone)
    return make_map(ctx.editor, keep, axis, at.rows, old, new, step.positions)


def stays(ctx: Context, place: Place, selection: Selection, at: Sequence) -> tuple[Node, Length]:
    """Which tokens of a sequence a selection leaves, bool [B, T], and how many of each row it does not.

    Raises:
        EditError: the selection is among tokens some of which are gone at the place.
    """
    editor, axis = ctx.editor, at.axis
    own = resolve(selection.axis) == resolve(axis)
    if not own:
        _check_whole(ctx, selection, axis, place)
    keep = selection.mask if own else ctx.align(selection.mask, selection.axis, axis, fill=1.0)
    if own and selection.group is not None:
        outside = editor.call(aten.logical_not.default, selection.group)
        keep = editor.call(aten.logical_or.default, keep, outside)
    gone = editor.arithmetic(sub, selection.size, selection.count)
    if not own:
        images = images_per_row(selection.mask, place.node)
        gone = editor.arithmetic(lambda n: n * images, gone)
    return keep, gone


def _check_whole(ctx: Context, selection: Selection, axis: Dim, place: Place) -> None:
    """Refuse a choice among tokens of which some are gone here: nobody knows how many of the chosen are left."""
    chosen = base = resolve(selection.axis)
    if ctx.sites.splice is not None and is_text_axis(ctx, axis) and not is_text_axis(ctx, base):
        base = resolve(ctx.program.axes.of(ctx.sites.splice.node)[1])
    cut = resolve(axis)
    while len(cut) == 1 and cut[0].origin is not None:
        cut = resolve(cut[0].origin)
        if base in (cut, patch_axis(ctx, cut)):
            grid = " x ".join(str(a.size) for a in chosen)
            among = f"the grid of {grid}" if len(chosen) > 1 else f"a sequence of {grid}"
            raise EditError(
                "tokens were chosen among some that an earlier drop removed",
                where=[place.address],
                found=f"a choice from {among} tokens; the sequence here holds {product(resolve(axis))}",
                remedy="score tokens after the earlier drop, as it left them",
            )
