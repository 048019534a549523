"""Positions after an edit: tables that are computed from integer positions are computed again from new ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.editing.edit import Editor
from tokcompile.editing.shapes import repaired_args

if TYPE_CHECKING:
    from tokcompile.editing.tokenmap import TokenMap
    from tokcompile.editing.transport import Transport

aten = torch.ops.aten
_COUNTERS = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default}


def positions_of(transport: Transport, value: Node, token_map: TokenMap) -> Node | None:
    """The integer positions that a floating-point value is computed from; None when it is not a position table."""
    todo, seen, found = [value], set(), set()
    while todo:
        node = todo.pop()
        held = node.meta.get("val")
        if node in seen or not isinstance(held, torch.Tensor | list | tuple):
            continue
        seen.add(node)
        if isinstance(held, torch.Tensor) and not held.dtype.is_floating_point:
            if transport.where(node, token_map.axis):
                if node.meta["val"].dtype == torch.bool:  # an additive mask, not a table
                    return None
                found.add(node)
            continue
        todo.extend(node.all_input_nodes)
    if len(found) != 1:
        return None
    positions = found.pop()
    return positions if positions in transport.rotary or _counts(positions) else None


def _counts(positions: Node) -> bool:
    todo, seen = [positions], set()
    while todo:
        node = todo.pop()
        if node.target in _COUNTERS:
            return True
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return False


def renumber(transport: Transport, value: Node, positions: Node, token_map: TokenMap) -> Node:
    """Compute a position table for compacted positions.

    A token that stays moves down by the number of tokens dropped before it, which is its old index minus its new one:
    so positions that start late (left padding) still do.
    """
    compacted = compact(transport, positions, token_map)
    done = transport.cloned.setdefault(id(token_map), {})
    done[positions] = compacted
    return recompute(transport.editor, value, positions, done, lambda n: repaired_args(transport, n, token_map))


def recompute(
    editor: Editor,
    value: Node,
    positions: Node,
    done: dict[Node, Node],
    args_of: Callable[[Node], list[Any]] = lambda n: list(n.args),
) -> Node:
    """Compute a value again from new positions.

    Args:
        value: what is computed from `positions`.
        done: new values by old ones; holds the new positions, and gets the copies that are made.
        args_of: arguments of a copy, before inputs are swapped.
    """
    for node in _between(positions, value):
        if node not in done:
            done[node] = editor.clone(node, done, args_of(node))
    return done[value]


def compact(transport: Transport, positions: Node, token_map: TokenMap) -> Node:
    """New integer positions: those of the kept tokens, less the number of tokens dropped before each.

    Tokens put in before a token move it up. A fresh token follows the one that stands for it, or precedes the first;
    without a position it has number 0, at which a rotation turns nothing.
    """
    known = transport.cloned.get(id(token_map), {})
    if positions in known:
        return known[positions]
    editor = transport.editor
    kept, spot, batch = transport.move_dim(positions, token_map, transport.where(positions, token_map.axis)[0])
    if token_map.positions == "compact":
        index = editor.call(aten.arange.default, token_map.new, device=positions.meta["val"].device)
        shift = _beside(editor, editor.call(aten.sub.Tensor, token_map.source, index), kept, (spot, batch))
        kept = editor.call(aten.sub.Tensor, kept, shift)
    if token_map.fresh is not None and token_map.following:
        number = editor.call(aten.mul.Tensor, editor.call(aten.cumsum.default, token_map.fresh, 1), token_map.fresh)
        kept = editor.call(aten.add.Tensor, kept, _beside(editor, number, kept, (spot, batch)))
    if token_map.fresh is not None and token_map.silent:
        kept = editor.call(aten.masked_fill.Scalar, kept, _beside(editor, token_map.fresh, kept, (spot, batch)), 0)
    return kept


def _beside(editor: Editor, value: Node, other: Node, dims: tuple[int, int]) -> Node:
    """A value [B, T'] with a dimension of size 1 for each of another's that counts no rows or tokens."""
    for dim in range(other.meta["val"].ndim):
        if dim not in dims:
            value = editor.call(aten.unsqueeze.default, value, dim)
    return value


def _between(start: Node, end: Node) -> list[Node]:
    """Nodes on the paths from one value to another, in graph order, the end included."""
    above: set[Node] = set()
    todo = [end]
    while todo:
        node = todo.pop()
        if node not in above and node is not start:
            above.add(node)
            todo.extend(node.all_input_nodes)
    below, out = {start}, []
    for node in sorted(above, key=lambda n: n._sort_key):
        if any(a in below for a in node.all_input_nodes):
            below.add(node)
            out.append(node)
    return out
