"""Operators for which a token's place matters: what an edit does when it reaches one."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.axes import product, resolve
from tokcompile.axes.context import arg, wrap
from tokcompile.axes.products import conv
from tokcompile.axes.rules import RULES as AXIS_RULES
from tokcompile.axes.rules import ordered, picked_from, source
from tokcompile.axes.sorts import unsorted
from tokcompile.axes.windows import resampled, windows
from tokcompile.counts import images_per_row
from tokcompile.editing.edit import Editor, sub
from tokcompile.editing.inserted import refuse_mixing
from tokcompile.editing.ranges import cat, select, slice_
from tokcompile.editing.shapes import flat_size
from tokcompile.editing.tokenmap import TokenMap, make_map
from tokcompile.errors import EditError
from tokcompile.program import place

if TYPE_CHECKING:
    from tokcompile.editing.transport import Transport

aten = torch.ops.aten
tokred = torch.ops.tokred
_ORDERED = {aten.flip.default: 1, aten.roll.default: 2}
_BY_INDEX = {
    aten.gather.default,
    aten.argmax.default,
    aten.argmin.default,
    aten.argsort.default,
    aten.unbind.int,
    aten.scatter.src,
    aten.scatter.value,
    aten.index_fill.int_Scalar,
    aten.index_fill.int_Tensor,
}
_BY_SOURCE = {tokred.insert_tokens.default, tokred.mark_tokens.default}
"""What earlier rules put in place of tokens [B, T, C], which they name by their numbers."""
_WRITTEN = {aten.index_put.default, aten.index_put_.default}
_PLACES = {aten.select.int, aten.slice.Tensor, aten.cat.default, aten.concat.default}
_TRIANGLES = {aten.triu.default, aten.tril.default}


def makes_values(node: Node) -> bool:
    """Whether an operator makes its result from sizes alone (`new_ones`): the result is on the old axis."""
    return AXIS_RULES.get(node.target) is source


def follow(transport: Transport, node: Node, token_map: TokenMap) -> TokenMap | None:
    """Handle an operator that picks tokens by place.

    Returns:
        None for an operator that treats all tokens alike; else the map of the axis that it makes from the edited one
        (its arguments are already repaired). A map whose axis is `()` means that the result has no token axis.

    Raises:
        EditError: the operator depends on places in a way that an edit cannot follow.
    """
    if token_map.shuffle is not None and node is token_map.shuffle.back:
        return _in_order_again(transport, node, token_map)
    if picked_from(node) in transport.edited and 0 in transport.where(node.args[0], token_map.axis):
        return _picked(transport, node, token_map)
    _refuse_indices(transport, node, token_map)
    _refuse_neighbours(transport, node, token_map)
    if token_map.fresh is not None:
        refuse_mixing(transport, node, token_map)
    edited = [a for a in node.all_input_nodes if token_map in transport.edited.get(a, [])]
    if (
        node.target is aten.masked_scatter.default
        and {*node.args[:2]} & {*edited}
        and not transport.fits(node, token_map)
    ):
        raise EditError(
            "features are put among tokens in turn after the place of the edit",
            where=[place(node)],
            found="fewer tokens to put them at than before",
            remedy="drop tokens further down, or the features themselves",
        )
    if token_map.reordered and node.target in _PLACES:
        _refuse_order(transport, node, token_map, edited[0])
    if node.target is aten.select.int:
        return select(transport, node, token_map, edited[0])
    if node.target is aten.slice.Tensor:
        return slice_(transport, node, token_map, edited[0])
    if node.target in (aten.cat.default, aten.concat.default):
        return cat(transport, node, token_map, edited[0])
    if AXIS_RULES.get(node.target) is ordered:
        return _sort(transport, node, token_map)
    if unsorted(node) is not None:
        return _unsort(transport, node, token_map)
    if node.target in _ORDERED:
        moved = node.args[_ORDERED[node.target]]
        moved = [moved] if isinstance(moved, int) else moved
        if any(wrap(d, len(transport.of(edited[0]))) in transport.where(edited[0], token_map.axis) for d in moved):
            raise EditError("the model reorders tokens after the place of the edit", where=[place(node)])
    return None


def _in_order_again(transport: Transport, node: Node, token_map: TokenMap) -> TokenMap | None:
    """Groups of patches put in the order of their features: the same order of those that are left."""
    editor = transport.editor
    editor.set_args(node, [node.args[0], [editor.call(aten.argsort.default, token_map.numbers)]])
    node.meta["val"] = editor.evaluate(node)
    return token_map.folded


def _picked(transport: Transport, node: Node, token_map: TokenMap) -> TokenMap:
    """Features that the model picks under a mask: all of them, which is checked when the graph runs.

    A model leaves out what pads its images, of which it has none then.
    """
    editor, mask = transport.editor, node.args[1][0]
    editor.require(mask, "features were dropped of images of which the model leaves out others itself")
    before = [product(dim) for dim in transport.of(node.args[0])]
    known = all(isinstance(size, int) for size in before)
    for size in [user for user in node.users if known and user.target in (aten.sym_size.int, aten.sym_numel.default)]:
        editor.fix(size, before[size.args[1]] if size.target is aten.sym_size.int else prod(before))
    transport.bring(node, mask, token_map)
    node.meta["val"] = editor.evaluate(node)
    return replace(token_map, axis=transport.of(node)[0])


def _refuse_neighbours(transport: Transport, node: Node, token_map: TokenMap) -> None:
    """Convolutions and pools over tokens: what is left would have other neighbours."""
    rule = AXIS_RULES.get(node.target)
    if rule not in (conv, windows, resampled):
        return
    size = len(transport.of(node.args[1])) - 2 if rule is conv else 2
    spots = transport.where(node.args[0], token_map.axis)
    mixed = any(spot >= len(transport.of(node.args[0])) - size for spot in spots)
    if mixed and not (rule is windows and transport.where(node, token_map.axis)):
        raise EditError(
            "the model mixes neighbouring tokens after the place of the edit",
            where=[place(node)],
            found=f"'{node.target}' over {tuple(node.args[0].meta['val'].shape)}",
            remedy="drop tokens further down, where no neighbours are mixed",
        )


def _refuse_order(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> None:
    where = wrap(arg(node, 1, "dim", 0), len(transport.of(value)))
    if where in transport.where(value, token_map.axis):
        raise EditError("the model takes tokens by their place in a sorted order", where=[place(node)])


def _refuse_indices(transport: Transport, node: Node, token_map: TokenMap) -> None:
    """Operators whose arguments or results are token numbers: those of the old sequence mean nothing on the new."""
    value = node.args[0]
    spots = transport.where(value, token_map.axis) if isinstance(value, Node) else []
    if not spots:
        return
    gathers = node.target is tokred.gather_tokens.default and wrap(node.args[2], len(transport.of(value))) in spots
    if gathers or (node.target in _BY_SOURCE and 1 in spots):
        raise EditError(
            "an earlier edit has taken tokens by their number behind the place of this one",
            where=[place(node)],
            found=f"{tuple(node.meta['val'].shape)} of {tuple(value.meta['val'].shape)}",
            remedy="put the rule that edits in front first; tokens that are inserted must not be taken out by `until`",
        )
    rank = len(transport.of(value))
    if node.target is aten.embedding.default:
        used = {0}
    elif node.target is aten.index.Tensor or (node.target in _WRITTEN and unsorted(node) is None):
        used = {i for i, index in enumerate(node.args[1]) if index is not None}
    elif node.target in _BY_INDEX:
        dim = arg(node, 1, "dim", 0 if node.target is aten.unbind.int else None)
        used = set(range(rank)) if dim is None else {wrap(dim, rank)}
    elif node.target in _TRIANGLES and len({rank - 2, rank - 1} & set(spots)) == 1:
        used = {rank - 2, rank - 1}
    else:
        return
    if used & set(spots) and not _chosen_anew(transport, node, token_map):
        raise EditError(
            "the model picks tokens by their number after the place of the edit",
            where=[place(node)],
            found=f"'{node.target}' on the token dimension of {tuple(value.meta['val'].shape)}",
            remedy="drop tokens further down, or where no later value is picked by number",
        )


def _chosen_anew(transport: Transport, node: Node, token_map: TokenMap) -> bool:
    """Whether the numbers come from a sort of the tokens that are left, or lead back from one."""
    if node.target is not aten.index.Tensor:
        return False
    for index in node.args[1]:
        maps = transport.edited.get(index, []) if index is not None else []
        if index is not None and not any(m.parent is token_map or token_map.parent is m for m in maps):
            return False
    return True


def _sort(transport: Transport, node: Node, token_map: TokenMap) -> TokenMap | None:
    """Tokens in an order that is computed from what is left of them, as experts are given their tokens."""
    before, after = transport.of(node.args[0]), [resolve(d) for d in transport.axes.context.dims[node][0]]
    where = next((i for i, (one, two) in enumerate(zip(before, after, strict=True)) if one != two), None)
    if where not in transport.where(node.args[0], token_map.axis):
        return None
    if token_map.reordered:
        raise EditError("the model sorts tokens that it has sorted before", where=[place(node)])
    new = flat_size(transport, node, before[where], token_map)
    old = flat_size(transport, node, before[where], replace(token_map, new=token_map.old))
    node.meta["val"] = transport.editor.evaluate(node)
    return replace(token_map, axis=after[where], rows=(), old=old, new=new, parent=token_map, part=None, reordered=True)


def _unsort(transport: Transport, node: Node, token_map: TokenMap) -> TokenMap | None:
    """The inverse of a sort: the numbers that it writes are those of the tokens that are left."""
    if not token_map.reordered:
        return None
    editor, values = transport.editor, node.args[2]
    count = editor.call(aten.arange.default, token_map.new, **_like(values))
    editor.set_args(node, [node.args[0], node.args[1], count, *node.args[3:]])
    node.meta["val"] = editor.evaluate(node)
    return token_map.parent


def _like(values: Node) -> dict[str, Any]:
    return {"dtype": values.meta["val"].dtype, "device": values.meta["val"].device}


def spliced(transport: Transport, node: Node, token_map: TokenMap) -> TokenMap:
    """The map of the text sequence that follows from dropping image features before they are spliced in.

    The splice puts one feature at each True of its mask, in order: the places of dropped features go with them.
    """
    editor, axes = transport.editor, transport.axes
    target, mask, _ = node.args
    flat = editor.call(aten.select.int, mask, -1, 0)
    keep = editor.call(tokred.splice_values.default, flat, token_map.keep, 1.0)
    rows, axis = axes.of(target)[0], axes.of(target)[1]
    images = images_per_row(token_map.keep, target)
    if node.args[2].meta["val"].ndim == 2 and rows:  # of all rows in one
        each = editor.arithmetic(lambda n: n * images, token_map.old)
        held = editor.call(aten.sum.dim_IntList, flat, [1])
        editor.require(editor.call(aten.eq.Scalar, held, each), "batch rows hold different numbers of image tokens")
    gone = editor.arithmetic(lambda a, b: (a - b) * images, token_map.old, token_map.new)
    old = editor.size(target, 1)
    new = editor.arithmetic(sub, old, gone)
    made = replace(make_map(transport.editor, keep, axis, rows, old, new, token_map.positions), spliced=token_map)
    if token_map.ascending:
        return made
    return replace(made, placed=_places(editor, made, token_map, flat, images))


def _places(editor: Editor, made: TokenMap, token_map: TokenMap, flat: Node, images: int) -> Node:
    """Where the tokens of a text stood, when features stand in another order than their places.

    Args:
        made: the map of the text, in the order of its places.
        token_map: the map of the features, [B * images, N'] of N.
        flat: bool [B, T], the places of features.
    """
    each = editor.arithmetic(lambda n: n * images, token_map.old)
    places = editor.call(tokred.kept_indices.default, flat, each)
    kept = editor.call(aten.gather.default, flat, 1, made.source)
    chosen = editor.call(tokred.splice_values.default, kept, token_map.source, 0.0)
    if images > 1:
        # By their number in the row, not by a view of the map: of images that a model picks by their values none is
        # known to be there.
        number = editor.call(aten.sub.Tensor, editor.call(aten.cumsum.default, kept, 1), 1)
        number = editor.call(aten.clamp.default, number, 0)
        image = editor.call(aten.div.Tensor_mode, number, token_map.new, rounding_mode="floor")
        chosen = editor.call(aten.add.Tensor, chosen, editor.call(aten.mul.Tensor, image, token_map.old))
        last = editor.arithmetic(lambda n: n - 1, each)
        chosen = editor.call(aten.clamp.default, chosen, 0, last)
    chosen = editor.call(aten.gather.default, places, 1, chosen)
    return editor.call(aten.where.self, kept, chosen, made.source)
