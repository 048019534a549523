"""Cache sites: the keys and values that a graph hands back, and those that it was given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.sites.block import Block

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
