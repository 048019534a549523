"""Splice sites: where image features are scattered among text embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from tokcompile.axes.rules import picked_from
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.convolution.default,
    aten.conv2d.padding,
    aten.conv1d.padding,
    aten.conv3d.padding,
}


@dataclass(frozen=True, eq=False)
class Splice:
    """Image features among text embeddings.

    Attributes:
        node: the spliced embeddings, [B, T, C].
        embeddings: those of the text, [B, T, C].
        mask: bool, True where a feature goes, [B, T, 1] or [B, T, C].
        features: the rows put there in order, [n, C] or [B, N, C].
        further: where other features follow, as a video's those of images.
    """

    node: Node
    embeddings: Node
    mask: Node
    features: Node
    further: tuple[Splice, ...] = ()

    @property
    def offered(self) -> Node:
        """The features, or the rows that they are picked from under a mask."""
        rows = picked_from(self.features)
        return self.features if rows is None else rows

    @property
    def all(self) -> tuple[Splice, ...]:
        """This one and those that follow."""
        return (self, *self.further)


def find_splice(graph: Graph, reach: Reach, inputs: list[Node]) -> Splice | None:
    """The first place where image features are scattered among embeddings.

    Args:
        inputs: what the caller passes: features may be computed here from an image, or be handed in ready.
    """
    images = [n for n in graph.nodes if n.target in CONVOLUTIONS]
    images += [n for n in inputs if n.meta["val"].dtype.is_floating_point]
    found = [
        Splice(node, *node.args[:3])
        for node in graph.nodes
        if node.target is aten.masked_scatter.default and reach.any_above(node.args[2], images)
    ]
    if not found:
        return None
    last, further = found[0].node, []
    for splice in found[1:]:
        if splice.embeddings is last:
            last, further = splice.node, [*further, splice]
    return replace(found[0], further=tuple(further))
