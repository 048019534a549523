"""Projector sites: what stands between the vision stack and the splice."""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Node

from tokcompile.sites.block import Stack
from tokcompile.sites.reach import Reach
from tokcompile.sites.splice import Splice

aten = torch.ops.aten
_MIXERS = {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default, aten.conv2d.default}


@dataclass(frozen=True, eq=False)
class Projector:
    """Attributes: input ([B, N, C], or [n, C] of all images in one) and output (the rows that are spliced in)."""

    input: Node
    output: Node

    @property
    def rows(self) -> bool:
        """Whether the features of one image have an axis of their own."""
        return self.input.meta["val"].ndim == 3


def find_projector(vision: Stack, splice: Splice, reach: Reach) -> Projector | None:
    """The first linear map that all image features pass through on their way from the vision stack to the splice."""
    stream = vision.blocks[vision.features].output
    path = [n for n in reach.order if reach.above(stream, n) and reach.above(n, splice.features)]
    for node in path[1:]:
        if node.target not in _MIXERS:
            continue
        data = node.args[1] if node.target is aten.addmm.default else node.args[0]
        return Projector(data, splice.features) if _only_way(data, path, splice.features) else None
    return None


def _only_way(gate: Node, path: list[Node], goal: Node) -> bool:
    """Whether `gate` dominates the goal within the path: no way around it."""
    inside = set(path)
    flow = nx.DiGraph((node, user) for node in path for user in node.users if user in inside)
    parent = nx.immediate_dominators(flow, path[0])
    node = goal
    while node is not gate and parent.get(node) not in (None, node):
        node = parent[node]
    return node is gate
