"""The patch grid: which sequences are rows and columns of patches."""

from __future__ import annotations

from tokcompile.axes import Dim, product, resolve
from tokcompile.program import Program
from tokcompile.sites.splice import CONVOLUTIONS


def patch_grid(program: Program, axis: Dim) -> tuple[int, int] | None:
    """Height and width of the grid whose patches a sequence holds, row by row; None without one.

    Two factors alone make no grid: a sequence may be split otherwise, such as in groups of patches that become one
    feature. A grid's factors are the last two dimensions that a convolution of the image leaves, or the first factors
    of these: of features that are made of some rows and columns of patches each.
    """
    axis = resolve(axis)
    if len(axis) < 2 or not all(isinstance(atom.size, int) for atom in axis):
        return None
    for node in program.graph.nodes:
        if node.target in CONVOLUTIONS and len(program.axes.of(node)) > 3:
            height, width = program.axes.of(node)[-2:]
            if axis == (*height, *width) and height and width:
                return product(height), product(width)
            if axis == (*height[:1], *width[:1]):
                return axis[0].size, axis[1].size
    return None
