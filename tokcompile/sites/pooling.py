"""How a model pools the projected patches of each image, before it joins those of several images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.axes import Axes
from tokcompile.program import tensor
from tokcompile.sites.projector import Projector, carrying, passed
from tokcompile.sites.reach import Reach

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Pooling:
    """Features of images between the projector's linear maps and the place where images are joined.

    Attributes:
        patches: the projected patches, [images, N, C].
        pooled: the features of each image that the model goes on with, [images, N', C]; `patches` where it pools none.
        between: the operators that lead from one to the other, in graph order.
    """

    patches: Node
    pooled: Node
    between: tuple[Node, ...]


def find_pooling(projector: Projector, reach: Reach, axes: Axes) -> Pooling | None:
    """How projected patches become the features of their image; None where images have no axis of their own.

    Projected patches are the last value that all features pass through and that counts images and patches as the
    projector's input does. Features are the last one after it that counts the same images.
    """
    if not projector.rows:
        return None
    start, end = projector.input, projector.output
    path = carrying(reach, start, end)
    whole = axes.of(start)
    features = [n for n in passed(path, [end]) if tensor(n) and n.meta["val"].ndim == 3]
    images = [n for n in features if axes.of(n)[0] == whole[0]]
    patches = [n for n in images if axes.of(n)[1] == whole[1]][-1]
    pooled = images[-1]
    between = (n for n in path if n is not patches and reach.above(patches, n) and reach.above(n, pooled))
    return Pooling(patches, pooled, tuple(between))
