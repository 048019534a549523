"""Projector sites: what stands between the vision stack and the splice."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import networkx as nx
import torch
from torch.fx import Node

from tokcompile.axes import Axes
from tokcompile.sites.attention import Attention
from tokcompile.sites.block import Stack
from tokcompile.sites.reach import Reach
from tokcompile.sites.splice import Splice

aten = torch.ops.aten
_MOVES = {
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.cat.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.permute.default,
    aten.select.int,
    aten.unbind.int,
    aten.transpose.int,
    aten.unflatten.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.index.Tensor,
    aten.split_with_sizes.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.to.dtype,
    operator.getitem,
}
"""Operators that put features elsewhere, and change none."""
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
    path = carrying(reach, stream, splice.features)
    data = next((_data(node) for node in path[1:] if node.target in _MIXERS), None)
    common = passed(path, [splice.features]) if data is not None else []
    return Projector(data, splice.features) if data is not None and data in common else None


def find_read_projector(vision: Stack, readers: list[Attention], reach: Reach) -> Projector | None:
    """The first linear map on the way from the vision stack to what text attends to, and the last value all read."""
    stream = vision.blocks[vision.features].output
    goals = [n for site in readers for n in (site.key, site.value) if reach.above(stream, n)]
    path = carrying(reach, stream, *goals)
    common = passed(path, goals) if goals else []
    data = next((_data(node) for node in common[1:] if node.target in _MIXERS), None)
    return Projector(data, common[-1]) if data is not None else None


def carrying(reach: Reach, start: Node, *goals: Node) -> list[Node]:
    """The nodes between a value and some goals, in order. Integers and masks say which tokens, and carry none."""

    def carries(node: Node) -> bool:
        value = node.meta.get("val")
        return not isinstance(value, torch.Tensor) or value.dtype.is_floating_point

    between = (n for n in reach.order if reach.above(start, n) and any(reach.above(n, goal) for goal in goals))
    return [n for n in between if carries(n)]


def projected_features(projector: Projector, axes: Axes, reach: Reach) -> Node | None:
    """What the projector makes of each of its features, in their order; behind it features are only moved.

    None where there is no such value: the projector makes other tokens of them.
    """
    path = carrying(reach, projector.input, projector.output)
    tokens = _tokens(axes, projector.input)
    for node in reversed(passed(path, [projector.output])[1:]):
        if any(n.target not in _MOVES for n in path if n is not node and reach.above(node, n)):
            return None
        if isinstance(node.meta.get("val"), torch.Tensor) and _tokens(axes, node) == tokens:
            return node
    return None


def _tokens(axes: Axes, node: Node) -> tuple[object, ...]:
    """What the dimensions of features but the last count, row by row."""
    return tuple(atom for dim in axes.of(node)[:-1] for atom in dim)


def _data(mixer: Node) -> Node:
    return mixer.args[1] if mixer.target is aten.addmm.default else mixer.args[0]


def passed(path: list[Node], goals: list[Node]) -> list[Node]:
    """The nodes of a path that every way from its first node to a goal passes, in order: its dominators."""
    inside = {*path, *goals}
    flow = nx.DiGraph((node, user) for node in path for user in node.users if user in inside)
    parent = nx.immediate_dominators(flow, path[0])
    chains = []
    for goal in goals:
        chain = [goal]
        while parent.get(chain[0]) not in (None, chain[0]):
            chain.insert(0, parent[chain[0]])
        chains.append(chain)
    return [node for node in chains[0] if all(node in chain for chain in chains)]
