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

    Blocks may have tables of their own, as those with a window do. A table has a row for each token; the sines of a
    time step, which condition all tokens alike, have none.
    """
    tokens = axes.of(stack.blocks[0].attention.query)[-2]
    by_positions: dict[Node, list[Node]] = {}
    for node in reach.order:
        if node.target in (aten.cos.default, aten.sin.default) and _turns(node, stack, reach):
            positions = _integer_source(node, axes, tokens) if _by_token(axes.of(node), tokens) else None
            if positions is not None:
                by_positions.setdefault(positions, []).append(node)
    return [Rotary(p, tuple(t)) for p, t in sorted(by_positions.items(), key=lambda item: reach.order[item[0]])]


def _turns(table: Node, stack: Stack, reach: Reach) -> bool:
    """Whether a table reaches the queries of a block, and is not in what the block reads already."""
    return any(reach.above(table, b.attention.query) and not reach.above(table, b.input) for b in stack.blocks)


def _by_token(dims: list[Dim], tokens: Dim) -> bool:
    """Whether a table has a dimension for tokens; a single token has none to look for."""
    return not tokens or any(tokens[-1] in dim for dim in dims)


def _integer_source(table: Node, axes: Axes, tokens: Dim) -> Node | None:
    """The last integers that a table is computed from; those by token, where others make its frequencies."""
    todo, seen, others = [table], set(), []
    while todo:
        node = todo.pop()
        val = node.meta.get("val")
        if not isinstance(val, torch.Tensor) or node in seen:
            continue
        seen.add(node)
        if not val.dtype.is_floating_point and val.ndim:
            if _by_token(axes.of(node), tokens):
                return node
            others.append(node)
            continue
        todo.extend(node.all_input_nodes)
    return next(iter(others), None)
