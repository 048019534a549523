"""Rotary sites: the integer positions that a stack's cosine and sine tables are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

import tokcompile.kernels  # noqa: F401  registers tokred::phase_scan, which a pass puts in place of positions
from tokcompile.axes import Axes, Dim, resolve
from tokcompile.sites.block import Stack
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
_SCAN = torch.ops.tokred.phase_scan.default


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

    Blocks may have tables of their own, as those with a window do, or those behind an edit that numbers positions anew.
    A table has a row for each token; the sines of a time step, which condition all tokens alike, have none.
    """
    tokens = dict.fromkeys(axes.of(block.attention.query)[-2] for block in stack.blocks)
    by_positions: dict[Node, list[Node]] = {}
    for node in reach.order:
        if node.target in (aten.cos.default, aten.sin.default) and _turns(node, stack, reach):
            own = next((each for each in tokens if _by_token(axes.of(node), each)), None)
            positions = _integer_source(node, axes, own) if own is not None else None
            if positions is not None:
                by_positions.setdefault(positions, []).append(node)
    return [Rotary(p, tuple(t)) for p, t in sorted(by_positions.items(), key=lambda item: reach.order[item[0]])]


def _turns(table: Node, stack: Stack, reach: Reach) -> bool:
    """Whether a table reaches the queries of a block, and is not in what the block reads already."""
    return any(reach.above(table, b.attention.query) and not reach.above(table, b.input) for b in stack.blocks)


def _by_token(dims: list[Dim], tokens: Dim) -> bool:
    """Whether a table has a dimension for tokens, or those they were cut from; a single token has none to look for."""
    while tokens:
        if any(tokens[-1] in dim for dim in dims):
            return True
        origin = tokens[-1].origin
        if origin is None:
            return False
        tokens = resolve(origin)
    return True


def _integer_source(table: Node, axes: Axes, tokens: Dim) -> Node | None:
    """The last integers that a table is computed from; those by token, where others make its frequencies."""
    todo, seen, others = [table], set(), []
    while todo:
        node = todo.pop()
        val = node.meta.get("val")
        if node in seen or not isinstance(val, torch.Tensor | list | tuple):
            continue
        if node.target is _SCAN:  # phases, not positions
            return None
        seen.add(node)
        if isinstance(val, torch.Tensor) and not val.dtype.is_floating_point and val.ndim:
            # Where there is one token, what has a row for more than one is no position: powers of a base are not.
            if _by_token(axes.of(node), tokens) and (tokens or not axes.of(node)[-1]):
                return node
            others.append(node)
            continue
        todo.extend(node.all_input_nodes)
    return next(iter(others), None)
