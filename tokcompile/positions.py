"""Positions after an edit: tables that are computed from integer positions are computed again from new ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tokcompile.shapes import repaired_args

if TYPE_CHECKING:
    from tokcompile.tokenmap import TokenMap, Transport

aten = torch.ops.aten
_COUNTERS = {aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default}


def positions_of(transport: Transport, value: Node, token_map: TokenMap) -> Node | None:
    """The integer positions that a floating-point value is computed from; None when it is not a position table."""
    todo, seen, found = [value], set(), set()
    while todo:
        node = todo.pop()
        if node in seen or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        seen.add(node)
        if not node.meta["val"].dtype.is_floating_point:
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
    chain = _between(positions, value)
    swap = {positions: compacted}
    for node in chain:
        key = (node, id(token_map))
        if key not in transport.cloned:
            copy = transport.editor.clone(node, swap, repaired_args(transport, node, token_map))
            transport.cloned[key] = copy
        swap[node] = transport.cloned[key]
    return swap[value]


def compact(transport: Transport, positions: Node, token_map: TokenMap) -> Node:
    """New integer positions: those of the kept tokens, less the number of tokens dropped before each."""
    key = (positions, id(token_map))
    if key in transport.cloned:
        return transport.cloned[key]
    editor = transport.editor
    kept, spot, batch = transport.move_dim(positions, token_map, transport.where(positions, token_map.axis)[0])
    index = editor.call(aten.arange.default, token_map.new, device=positions.meta["val"].device)
    shift = editor.call(aten.sub.Tensor, token_map.source, index)
    for dim in range(kept.meta["val"].ndim):
        if dim not in (spot, batch):
            shift = editor.call(aten.unsqueeze.default, shift, dim)
    transport.cloned[key] = editor.call(aten.sub.Tensor, kept, shift)
    return transport.cloned[key]


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
