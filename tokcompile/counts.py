"""How many images and features a graph holds, as seen at capture."""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.errors import EditError
from tokcompile.program import place

aten = torch.ops.aten


def images_per_row(features: Node, sequence: Node) -> int:
    """How many images each batch row has.

    Raises:
        EditError: the images do not divide evenly among the rows.
    """
    images, rows = (count(n, 0) for n in (features, sequence))
    if images % rows:
        raise EditError(
            "images do not divide evenly among batch rows",
            where=[place(sequence)],
            found=f"{images} images in {rows} rows",
            remedy="batch rows with equally many images",
        )
    return images // rows


def count(node: Node, dim: int) -> int:
    """The size of a dimension as seen at capture; exact for static sizes.

    Of images that the model picks by their values all are counted: a map that is made with the count says at run time
    when there are fewer.

    Raises:
        EditError: the size is known only when the model runs.
    """
    size = node.meta["val"].shape[dim]
    known = size if isinstance(size, int) else size.node.hint
    if known is None:
        known = next((_picked_from(n) for n in node.graph.nodes if _picks(n, size)), None)
    if known is None:
        raise EditError(
            "a number of images is known only when the model runs",
            found=f"{size}, which depends on the values of an input",
            remedy="use a rule that drops tokens before images are chosen by their values, or none",
        )
    return int(known)


def _picks(node: Node, size: torch.SymInt) -> bool:
    """Whether a node picks rows under a mask, as many as a size says."""
    if node.target is not aten.index.Tensor or len(node.args[1]) != 1 or node.args[1][0] is None:
        return False
    rows = node.meta["val"].shape[0]
    return (
        node.args[1][0].meta["val"].dtype == torch.bool
        and isinstance(rows, torch.SymInt)
        and same(size_of(rows), size_of(size))
    )


def _picked_from(node: Node) -> int | None:
    sizes = node.args[1][0].meta["val"].shape
    return prod(sizes) if all(isinstance(s, int) for s in sizes) else None
