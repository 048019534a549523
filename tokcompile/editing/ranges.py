"""Operators that take tokens from the ends of a sequence, or join others to it: what an edit does there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.axes import resolve
from tokcompile.axes.context import MAX, arg, is_empty, wrap
from tokcompile.editing.edit import Editor, Length, add, sub
from tokcompile.editing.inserted import originals
from tokcompile.errors import EditError
from tokcompile.program import place

if TYPE_CHECKING:
    from tokcompile.editing.tokenmap import TokenMap
    from tokcompile.editing.transport import Transport

aten = torch.ops.aten


def select(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap | None:
    where, index = wrap(node.args[1], len(transport.of(value))), node.args[2]
    if where not in transport.where(value, token_map.axis):
        return None
    if token_map.fresh is not None:
        return _of_originals(transport, node, token_map, value)
    if not isinstance(index, int):
        raise EditError("the model takes a token by a computed index", where=[place(node)])
    ends = (0, index + 1) if index >= 0 else (index, MAX)
    _refuse_slots(node, token_map, index >= 0)
    _require_kept(transport, node, token_map, *ends)
    return replace(token_map, axis=())


def slice_(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap | None:
    where = wrap(arg(node, 1, "dim", 0), len(transport.of(value)))
    if where not in transport.where(value, token_map.axis):
        return None
    if token_map.fresh is not None and token_map.parent is None:
        return _of_inserted(transport, node, token_map, value, where)
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
    _refuse_slots(node, token_map, start > 0 or (end is not None and end > 0))
    transport.editor.set_args(node, [value, node.args[1], start, MAX if end is None else end])
    if start < 0 or (end is not None and end > 0):
        return _short_slice(transport, node, token_map, start, end)
    return _long_slice(transport, node, token_map, where, start, end)


def _of_originals(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap:
    """Tokens that are taken by place are those of the old sequence."""
    if value.meta["val"].ndim > 3:
        raise EditError(
            "the model takes some of the keys or queries by place after tokens were put in",
            where=[place(node)],
            found=f"'{node.target}' of {tuple(value.meta['val'].shape)}, as a sliding window's cache does",
            remedy="insert where all tokens go through together, or call the model with use_cache=False",
        )
    transport.editor.swap_input(node, value, originals(transport, value, token_map))
    return replace(token_map, axis=())


def _of_inserted(transport: Transport, node: Node, token_map: TokenMap, value: Node, where: int) -> TokenMap:
    """A range of a sequence that tokens were put into.

    Where the class tokens in front are parted from the patches, as for rotary tables of these alone, and joined with
    them again, tokens that were put in before the patches go with the class tokens.
    """
    start, end, step = arg(node, 2, "start") or 0, arg(node, 3, "end"), arg(node, 4, "step", 1)
    open_end = end is None or (isinstance(end, int) and end >= MAX)
    border = start if open_end else end
    if transport.borders.get(value) != border and not _parted(node, value, where, border):
        return _of_originals(transport, node, token_map, value)
    run = token_map.run
    alone = transport.of(value)[where] == resolve(token_map.axis) and step == 1
    if run is None or not isinstance(run[0], int) or run[0] > border or not alone:
        raise EditError(
            "the model parts class tokens from patches, and tokens were put in among or behind the patches",
            where=[place(node)],
            found=f"{border} class tokens",
            remedy="insert at `where: front` or `where: patches`",
        )
    transport.borders[value] = border  # the other part is seen later
    bounds = (border + run[1], MAX) if open_end else (0, border + run[1])
    transport.editor.set_args(node, [value, node.args[1], *bounds])
    node.meta["val"] = transport.editor.evaluate(node)
    if not open_end:
        transport.parted[node] = token_map
        transport.mark(node, token_map)
    return replace(token_map, axis=())


def _parted(node: Node, value: Node, where: int, border: Any) -> bool:
    """Whether a value is taken apart at a place, `[:n]` and `[n:]`, and the first part is joined to others again."""
    if not isinstance(border, int) or border <= 0:
        return False
    parts = [u for u in value.users if u.target is aten.slice.Tensor and arg(u, 1, "dim", 0) == node.args[1]]
    first = [u for u in parts if (arg(u, 2, "start") or 0) == 0 and arg(u, 3, "end") == border]
    rest = [u for u in parts if arg(u, 2, "start") == border and (arg(u, 3, "end") or MAX) >= MAX]
    return bool(first and rest) and all(_joins(u, each, where) for each in first for u in each.users)


def _joins(user: Node, part: Node, where: int) -> bool:
    joins = user.target in (aten.cat.default, aten.concat.default) and user.args[0][0] is part
    return joins and wrap(arg(user, 1, "dim", 0), part.meta["val"].ndim) == where


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
        filled=token_map.filled and editor.call(aten.slice.Tensor, token_map.filled, 1, start, stop),
        stand_ins=token_map.stand_ins and editor.call(aten.slice.Tensor, token_map.stand_ins, 1, start, stop),
        old=editor.arithmetic(sub, token_map.old, gone),
        new=editor.arithmetic(sub, token_map.new, gone),
        parent=None,
        part=(token_map, start, -(end or 0)),
    )


def _refuse_slots(node: Node, token_map: TokenMap, front: bool) -> None:
    """Refuse places counted from the front of a sequence whose first slots may be empty."""
    if token_map.filled is not None and front:
        raise EditError(
            "the model takes tokens by their place from the front, after markers stand for some",
            where=[place(node)],
            found="how many tokens are left depends on the data, and they end at the last place",
            remedy="mark further down, or use a drop step",
        )


def _require_kept(transport: Transport, node: Node, token_map: TokenMap, start: int, end: int) -> None:
    part = transport.editor.call(aten.slice.Tensor, token_map.keep, 1, start, end)
    transport.editor.require(
        part,
        f"a dropped token is read by its place in {place(node)}: keep it, as a select step "
        "`by: protect` does for the first and the last",
    )


def cat(transport: Transport, node: Node, token_map: TokenMap, value: Node) -> TokenMap | None:
    where = wrap(arg(node, 1, "dim", 0), len(transport.of(value)))
    if any(transport.parted.get(part) is token_map for part in node.args[0]):
        node.meta["val"] = transport.editor.evaluate(node)
        return token_map
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
    _refuse_slots(node, token_map, True)
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
    keep, fresh = token_map.keep, token_map.fresh
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
            if fresh is not None:
                own = editor.call(aten.new_full.default, fresh, [editor.size(fresh, 0), count], False)
                fresh = editor.call(aten.cat.default, [own, fresh] if first else [fresh, own], 1)
    return replace(
        token_map,
        axis=axis,
        source=source_,
        keep=keep,
        old=old,
        new=new,
        parent=token_map,
        part=None,
        fresh=fresh,
        inverse=_extended_inverse(editor, token_map, before, after),
        run=None,
    )


def _extended_inverse(editor: Editor, token_map: TokenMap, before: int, after: int) -> Node | None:
    """Where the old tokens went, of a sequence with more tokens at its ends."""
    inverse = token_map.inverse
    if inverse is None:
        return None
    inverse = editor.call(aten.add.Tensor, inverse, before)
    rows, device = editor.size(inverse, 0), inverse.meta["val"].device
    for count, start in ((before, 0), (after, editor.arithmetic(add, token_map.new, before))):
        if count:
            index = editor.call(aten.arange.start, start, editor.arithmetic(add, start, count), device=device)
            index = editor.call(aten.expand.default, index, [rows, count])
            inverse = editor.call(aten.cat.default, [index, inverse] if start == 0 else [inverse, index], 1)
    return inverse
