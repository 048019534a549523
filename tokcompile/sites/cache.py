"""Cache sites: the keys and values that a graph hands back, and those that it was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.sites.block import Block
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.repeat_interleave.self_int,
}


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one block, [B, Hkv, T, D].

    Attributes:
        key, value: what the graph hands back.
        past: the cached keys that it was given; None in a prefill.
    """

    key: Node
    value: Node
    past: Node | None


def find_cache(block: Block, outputs: set[Node]) -> Cache | None:
    """The cache of a block; None when the graph neither returns nor reads one."""
    key, past = _trace(block.attention.key, outputs)
    value, _ = _trace(block.attention.value, outputs)
    if key is None or value is None:
        return None
    return Cache(key, value, past)


def _trace(node: Node, outputs: set[Node]) -> tuple[Node | None, Node | None]:
    while node.target in _VIEWS and node not in outputs:
        node = node.args[0]
    past = None
    if node.target is aten.cat.default:
        first = node.args[0][0]
        past = first if first.op == "placeholder" else None
    return (node, past) if node in outputs or past is not None else (None, None)


def handed_back(block: Block, reach: Reach, outputs: Iterable[Node]) -> list[Node]:
    """The outputs that a later step makes a block's keys and values from.

    Beside whole keys and values, these are parts of them, as a sliding window keeps, and what they are computed from.
    """
    site = block.attention
    sources = [_source(site.key), _source(site.value)]
    found = []
    for node in outputs:
        own = reach.above(block.input, node) and node is not block.input
        if not own or reach.above(site.node, node) or reach.above(site.query, node):
            continue
        below = any(reach.above(source, node) for source in sources)
        above = any(reach.above(node, value) for value in (site.key, site.value))
        if below or above:
            found.append(node)
    return found


def key_heads(block: Block) -> int:
    """Heads of a block's keys, before they are repeated for the heads of the queries."""
    node = block.attention.key
    shape = node.meta["val"].shape
    heads = shape[1]
    while node.target in _VIEWS:
        node = node.args[0]
        now = node.meta["val"].shape
        if len(now) == 4 and set(now[-2:]) == set(shape[-2:]):
            heads = min(heads, now[1])
    return heads


def _source(node: Node) -> Node:
    while node.target in _VIEWS:
        node = node.args[0]
    return node
