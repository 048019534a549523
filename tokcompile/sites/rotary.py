"""Rotary sites: the integer positions that a stack's cosine and sine tables are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.sites.block import Stack
from tokcompile.sites.reach import Reach

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Rotary:
    """One family of rotary tables.

    Attributes:
        positions: the last integer value before the tables, [.., T, ..].
        tables: the cosine and sine nodes.
    """

    positions: Node
    tables: tuple[Node, ...]


def find_rotary(stack: Stack, reach: Reach) -> list[Rotary]:
    """Rotary tables that the queries of a stack are turned by; none for learned or absent positions."""
    first = stack.blocks[0]
    stream = reach.ancestors([first.input])
    side = reach.ancestors([first.attention.query]) - stream
    by_positions: dict[Node, list[Node]] = {}
    for node in side:
        if node.target in (aten.cos.default, aten.sin.default):
            positions = _integer_source(node)
            if positions is not None:
                by_positions.setdefault(positions, []).append(node)
    order = reach.order
    return [
        Rotary(p, tuple(sorted(t, key=order.__getitem__)))
        for p, t in sorted(by_positions.items(), key=lambda item: order[item[0]])
    ]


def _integer_source(table: Node) -> Node | None:
    todo, seen = [table], set()
    while todo:
        node = todo.pop()
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or node in seen:
            continue
        seen.add(node)
        if not val.dtype.is_floating_point and val.ndim:
            return node
        todo.extend(node.all_input_nodes)
    return None
