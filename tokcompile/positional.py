"""Operators for which a token's place matters: what an edit does when it reaches one."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.axes import resolve, size_of
from tokcompile.axes.atoms import same
from tokcompile.axes.context import MAX, arg, is_empty, wrap
from tokcompile.axes.rules import RULES as AXIS_RULES
from tokcompile.axes.rules import ordered, source, unsorted
from tokcompile.edit import Length, add, sub
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.shapes import flat_size

if TYPE_CHECKING:
    from tokcompile.tokenmap import TokenMap, Transport

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
    _refuse_indices(transport, node, token_map)
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
        return _select(transport, node, token_map, edited[0])
    if node.target is aten.slice.Tensor:
        return _slice(transport, node, token_map, edited[0])
    if node.target in (aten.cat.default, aten.concat.default):
        return _cat(transport, node, token_map, edited[0])
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


def _select(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap | None:
    where, index = wrap(node.args[1], len(transport.of(value))), node.args[2]
    if where not in transport.where(value, token_map.axis):
        return None
    if not isinstance(index, int):
        raise EditError("the model takes a token by a computed index", where=[place(node)])
    ends = (0, index + 1) if index >= 0 else (index, MAX)
    _require_kept(transport, node, token_map, *ends)
    return replace(token_map, axis=())


def _slice(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap | None:
    where = wrap(arg(node, 1, "dim", 0), len(transport.of(value)))
    if where not in transport.where(value, token_map.axis):
        return None
    start, end, step = arg(node, 2, "start") or 0, arg(node, 3, "end"), arg(node, 4, "step", 1)
    end = None if isinstance(end, int) and end >= MAX else end
    if not isinstance(start, int) or step != 1 or not (end is None or isinstance(end, int)):
        raise EditError("the model takes a range of tokens by computed bounds", where=[place(node)])
    if transport.of(value)[where] == resolve(token_map.axis):
        start, end = _near_bounds(start, end, token_map.old)
    elif start or end is not None:
        raise EditError("the model takes a range of several sequences in one", where=[place(node)])
    if not start and end is None:
        return None
    transport.editor.set_args(node, [value, node.args[1], start, MAX if end is None else end])
    if start < 0 or (end is not None and end > 0):
        return _short_slice(transport, node, token_map, start, end)
    return _long_slice(transport, node, token_map, where, start, end)


def _near_bounds(start: int, end: int | None, old: Length) -> tuple[int, int | None]:
    """Bounds of a range, each counted from the end of the sequence that is nearer: there it stays true after an edit.

    `[0:1]` of many tokens is the first of them, `[0:-1]` and its like with a number are all but the last.
    """
    if not isinstance(old, int):
        return start, end
    if 2 * start > old:
        start -= old
    if end is not None and 2 * end > old:
        end = end - old if end < old else None
    return start, end


def _short_slice(transport: Transport, node: Node, token_map: TokenMap, start: int, end: int | None) -> TokenMap:
    """A fixed number of tokens at one end: they must all have stayed."""
    taken = abs(start if start < 0 else end or 0)
    if isinstance(token_map.new, int) and taken > token_map.new:
        raise EditError(
            "the model takes more tokens from one end than the edit leaves",
            where=[place(node)],
            found=f"{taken} of {token_map.new} tokens, as a sliding window's cache does",
            remedy="keep more tokens, or call the model with use_cache=False",
        )
    if start < 0 and end is None:
        _require_kept(transport, node, token_map, start, MAX)
    elif start >= 0 and end is not None and end > 0:
        _require_kept(transport, node, token_map, 0, end)
    else:
        raise EditError("the model takes tokens from the middle of an edited sequence", where=[place(node)])
    return replace(token_map, axis=())


def _long_slice(
    transport: Transport, node: Node, token_map: TokenMap, where: int, start: int, end: int | None
) -> TokenMap:
    """All tokens but a fixed number at the ends: those must have stayed, and the rest follows the map."""
    axis = transport.of(node)[where]
    node.meta["val"] = transport.editor.evaluate(node)
    if token_map.parent is not None and resolve(token_map.parent.axis) == axis:
        return token_map.parent  # what was joined is taken off again
    key = ("range", token_map, axis, start, end)
    if key not in transport.derived:
        transport.derived[key] = _range(transport, node, token_map, axis, start, end)
    return transport.derived[key]


def _range(transport: Transport, node: Node, token_map: TokenMap, axis: Any, start: int, end: int | None) -> TokenMap:
    """The map of all tokens but a fixed number at the ends. One for all that take it: they may meet again."""
    editor, stop = transport.editor, MAX if end is None else end
    if start:
        _require_kept(transport, node, token_map, 0, start)
    if end is not None:
        _require_kept(transport, node, token_map, end, MAX)
    gone = start - (end or 0)
    source_ = editor.call(aten.slice.Tensor, token_map.source, 1, start, stop)
    if start:
        source_ = editor.call(aten.sub.Tensor, source_, start)
    return replace(
        token_map,
        axis=axis,
        source=source_,
        keep=editor.call(aten.slice.Tensor, token_map.keep, 1, start, stop),
        old=editor.arithmetic(sub, token_map.old, gone),
        new=editor.arithmetic(sub, token_map.new, gone),
        parent=None,
        part=(token_map, start, -(end or 0)),
    )


def _require_kept(transport: Transport, node: Node, token_map: TokenMap, start: int, end: int) -> None:
    part = transport.editor.call(aten.slice.Tensor, token_map.keep, 1, start, end)
    transport.editor.require(
        part,
        f"a dropped token is read by its place in {place(node)}: keep it, as a select step "
        "`by: protect` does for the first and the last",
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


def _cat(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap | None:
    where = wrap(arg(node, 1, "dim", 0), len(transport.of(value)))
    if where not in transport.where(value, token_map.axis):
        return None
    parts = [v for v in node.args[0] if not is_empty(v)]
    dims = [transport.of(v)[where] for v in parts]
    axis = resolve(token_map.axis)
    if len(parts) == 1 or resolve(transport.of(node)[where])[-len(axis) :] == axis:
        return None  # rows stacked, each with the same axis: the axis itself goes through
    if sum(d == axis for d in dims) != 1:
        raise EditError("tokens are joined with others of the same sequence", where=[place(node)])
    if token_map.reordered or not _made_here(transport, parts, where, axis):
        raise EditError(
            "edited tokens are joined with others after the place of the edit",
            where=[place(node)],
            found="a non-empty KV cache, or tokens that another sequence brings",
            remedy="prune in the first prefill of a conversation, or edit after the join",
        )
    return _joined(transport, node, token_map, where, dims.index(axis))


def _made_here(transport: Transport, parts: list[Node], where: int, axis: Any) -> bool:
    """Whether all that is joined with the tokens has a fixed length: register tokens, the column of a sink."""
    others = [v for v in parts if transport.of(v)[where] != axis]
    cached = any(n.op == "placeholder" for v in others for n in (v, *v.all_input_nodes) if _is_input(transport, n))
    return not cached and all(isinstance(v.meta["val"].shape[where], int) for v in others)


def _is_input(transport: Transport, node: Node) -> bool:
    return transport.editor.program.kinds.get(node) == "input"


def _joined(transport: Transport, node: Node, token_map: TokenMap, where: int, own: int) -> TokenMap:
    """The map of a sequence that joins the tokens with others, all of which stay."""
    for value in list(node.args[0]):
        if token_map not in transport.edited.get(value, []):
            transport.bring(node, value, token_map)
    sizes = [v.meta["val"].shape[where] for v in node.args[0]]
    before, after = sum(sizes[:own]), sum(sizes[own + 1 :])
    node.meta["val"] = transport.editor.evaluate(node)
    axis = transport.of(node)[where]
    whole, *taken = token_map.part or (None,)
    if whole is not None and taken == [before, after] and resolve(whole.axis) == axis:
        return whole  # what was taken off is joined again: as many tokens, all of which stayed
    key = ("joined", token_map, axis, before, after)
    if key not in transport.derived:
        transport.derived[key] = _extended(transport, token_map, axis, before, after)
    return transport.derived[key]


def _extended(transport: Transport, token_map: TokenMap, axis: Any, before: int, after: int) -> TokenMap:
    """The map of a sequence with more tokens at its ends. One for all that join them: they may meet again."""
    editor = transport.editor
    source_ = editor.call(aten.add.Tensor, token_map.source, before) if before else token_map.source
    keep = token_map.keep
    rows = editor.size(source_, 0)
    device = source_.meta["val"].device
    old = editor.arithmetic(add, token_map.old, before + after)
    new = editor.arithmetic(add, token_map.new, before + after)
    for count, start in ((before, 0), (after, editor.arithmetic(add, token_map.old, before))):
        if count:
            end = editor.arithmetic(add, start, count)
            index = editor.call(aten.arange.start, start, end, device=device)
            index = editor.call(aten.expand.default, index, [rows, count])
            stays = editor.call(aten.new_full.default, keep, [editor.size(keep, 0), count], True)
            first = count == before and start == 0
            source_ = editor.call(aten.cat.default, [index, source_] if first else [source_, index], 1)
            keep = editor.call(aten.cat.default, [stays, keep] if first else [keep, stays], 1)
    return replace(token_map, axis=axis, source=source_, keep=keep, old=old, new=new, parent=token_map, part=None)


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
    return replace(make_map(transport, keep, axis, rows, old, new, token_map.positions), spliced=token_map)


def make_map(transport: Transport, keep: Node, axis: Any, rows: Any, old: Any, new: Any, positions: str) -> TokenMap:
    """Build a map from a keep mask, and check at run time that every row keeps as many tokens as the map says."""
    from tokcompile.tokenmap import TokenMap

    editor = transport.editor
    kept = editor.call(aten.sum.dim_IntList, keep, [1])
    editor.require(editor.call(aten.eq.Scalar, kept, new), "batch rows hold different numbers of image tokens")
    indices = editor.call(tokred.kept_indices.default, keep, new, name="kept")
    indices.meta["token_map"] = f"{editor.rule}/{sum('token_map' in n.meta for n in editor.program.graph.nodes)}"
    return TokenMap(axis, rows, indices, keep, old, new, positions)


def images_per_row(features: Node, sequence: Node) -> int:
    """How many images each batch row has.

    Raises:
        EditError: the images do not divide evenly among the rows.
    """
    images, rows = (count(n, 0) for n in (features, sequence))
    if images % rows:
        raise EditError(
            "images do not divide evenly among batch rows",
            where=[place(sequence)],
            found=f"{images} images in {rows} rows",
            remedy="batch rows with equally many images",
        )
    return images // rows


def count(node: Node, dim: int) -> int:
    """The size of a dimension as seen at capture; exact for static sizes.

    Of images that the model picks by their values all are counted: a map that is made with the count says at run time
    when there are fewer.

    Raises:
        EditError: the size is known only when the model runs.
    """
    size = node.meta["val"].shape[dim]
    known = size if isinstance(size, int) else size.node.hint
    if known is None:
        known = next((_picked_from(n) for n in node.graph.nodes if _picks(n, size)), None)
    if known is None:
        raise EditError(
            "a number of images is known only when the model runs",
            found=f"{size}, which depends on the values of an input",
            remedy="use a rule that drops tokens before images are chosen by their values, or none",
        )
    return int(known)


def _picks(node: Node, size: torch.SymInt) -> bool:
    """Whether a node picks rows under a mask, as many as a size says."""
    if node.target is not aten.index.Tensor or len(node.args[1]) != 1 or node.args[1][0] is None:
        return False
    rows = node.meta["val"].shape[0]
    return (
        node.args[1][0].meta["val"].dtype == torch.bool
        and isinstance(rows, torch.SymInt)
        and same(size_of(rows), size_of(size))
    )


def _picked_from(node: Node) -> int | None:
    sizes = node.args[1][0].meta["val"].shape
    return prod(sizes) if all(isinstance(s, int) for s in sizes) else None
