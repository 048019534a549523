"""Rotary sites: the integer positions that a stack's cosine and sine tables are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.axes import Axes, Dim
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


def find_rotary(stack: Stack, reach: Reach, axes: Axes) -> list[Rotary]:
    """Rotary tables that the queries of a stack are turned by; none for learned or absent positions.

    A table has a row for each token; the sines of a time step, which condition all tokens alike, have none.
    """
    first = stack.blocks[0]
    stream = reach.ancestors([first.input])
    side = reach.ancestors([first.attention.query]) - stream
    tokens = axes.of(first.attention.query)[-2]
    by_positions: dict[Node, list[Node]] = {}
    for node in side:
        if node.target in (aten.cos.default, aten.sin.default) and _by_token(axes.of(node), tokens):
            positions = _integer_source(node)
            if positions is not None:
                by_positions.setdefault(positions, []).append(node)
    order = reach.order
    return [
        Rotary(p, tuple(sorted(t, key=order.__getitem__)))
        for p, t in sorted(by_positions.items(), key=lambda item: order[item[0]])
    ]


def _by_token(dims: list[Dim], tokens: Dim) -> bool:
    """Whether a table has a dimension for tokens; a single token has none to look for."""
    return not tokens or any(tokens[-1] in dim for dim in dims)


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
