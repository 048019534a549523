"""The patch grid: which sequences are rows and columns of patches."""

from __future__ import annotations

from tokcompile.axes import Dim, resolve
from tokcompile.program import Program
from tokcompile.sites.splice import CONVOLUTIONS


def patch_grid(program: Program, axis: Dim) -> tuple[int, int] | None:
    """Height and width of the grid whose patches a sequence holds, row by row; None without one.

    Two factors alone make no grid: a sequence may be split otherwise, such as in groups of patches that become one
    feature. A grid's factors are the last two dimensions that a convolution of the image leaves.
    """
    axis = resolve(axis)
    if len(axis) != 2 or not all(isinstance(atom.size, int) for atom in axis):
        return None
    sides = [(atom,) for atom in axis]
    made = (node for node in program.graph.nodes if node.target in CONVOLUTIONS)
    if not any([resolve(dim) for dim in program.axes.of(node)[-2:]] == sides for node in made):
        return None
    return axis[0].size, axis[1].size
