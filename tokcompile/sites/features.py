"""Image features: their axis, and the patches of the vision stack that become one feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.program import Program
from tokcompile.sites.find import Sites
from tokcompile.sites.grid import patch_grid

aten = torch.ops.aten
_SORTS = {aten.argsort.default, aten.argsort.stable}


@dataclass(frozen=True)
class Sequence:
    """A sequence of tokens within a value.

    Attributes:
        rows: the batch rows; `()` for a batch of one.
        axis: the tokens of one row.
        dim: the dimension that counts tokens.
        packed: whether that dimension holds all rows, one after the other.
    """

    rows: Dim
    axis: Dim
    dim: int
    packed: bool


@dataclass(frozen=True, eq=False)
class Shuffle:
    """Groups of patches in an order of their own, as windows of attention want them.

    Attributes:
        axis: the groups, of all rows.
        numbers: the feature that each group becomes, an integer [n].
        back: where what they became is put in the order of the features again.
    """

    axis: Dim
    numbers: Node
    back: Node


@dataclass(frozen=True)
class Fold:
    """Patches that are merged to features, so many neighbours each.

    Attributes:
        patches: the patches of one row, or of all where they are shuffled.
        features: what they become; its factors are some of those of the patches, if these are not shuffled.
        shuffle: how the patches stand in another order than the features.
    """

    patches: Dim
    features: Dim
    shuffle: Shuffle | None = None

    @property
    def members(self) -> int:
        """Patches of one feature."""
        groups = self.features if self.shuffle is None else self.shuffle.axis
        return product(self.patches) // product(groups)


def sequence(program: Program, sites: Sites, node: Node) -> Sequence | None:
    """The tokens of a value [B, T, C], or of one that packs the patches of all rows: [n, C] or [1, n, C].

    Rows of a packed value are those of the text that the features go to, in equal shares.
    """
    dims = program.axes.of(node)
    if len(dims) not in (2, 3):
        return None
    where = len(dims) - 2
    lead = dims[0] if where else ()
    rows = text_rows(program, sites)
    if not lead and rows and dims[where][: len(rows)] == rows:
        return Sequence(rows, dims[where][len(rows) :], where, packed=True)
    if not lead and find_shuffle(program, dims[where]) is not None:
        return Sequence((), dims[where], where, packed=True)
    return Sequence(lead, dims[where], where, packed=not where) if where or not rows else None


def text_rows(program: Program, sites: Sites) -> Dim:
    """The batch rows of the text that features are spliced into; `()` for one row, or where nothing is spliced."""
    return program.axes.of(sites.splice.node)[0] if sites.splice is not None else ()


def features(program: Program, sites: Sites) -> Sequence | None:
    """The features of images as the projector reads them, or else as they are spliced in."""
    if sites.projector is not None and not _shuffled(program, sites.projector.input):
        return sequence(program, sites, sites.projector.input)
    return sequence(program, sites, sites.splice.offered) if sites.splice is not None else None


def _shuffled(program: Program, node: Node) -> bool:
    return any(find_shuffle(program, dim) is not None for dim in program.axes.of(node))


def find_shuffle(program: Program, axis: Dim) -> Shuffle | None:
    """How groups of patches that a dimension counts were put in another order than that of their features."""
    axis = resolve(axis)
    for node in program.graph.find_nodes(op="call_function", target=aten.index.Tensor):
        back = node.args[1][0] if len(node.args[1]) == 1 else None
        if back is None or back.target not in _SORTS:
            continue
        groups, *others = program.axes.of(back.args[0])
        if groups and not others and program.axes.of(node.args[0])[:1] == [groups] == [axis[: len(groups)]]:
            return Shuffle(groups, back.args[0], node)
    return None


def images_per_row(program: Program, sites: Sites, packed: Sequence) -> int | None:
    """How many images a row of packed features holds; None where that is not known.

    Features that are rows and columns of one grid are of one image. Otherwise images are counted by the bounds, an
    integer input of one dimension, that keep attention of the vision stack within each.
    """
    if patch_grid(program, packed.axis) is not None:
        return 1
    stack = sites.stacks.get("vision")
    mask = stack.blocks[stack.features].attention.mask if stack is not None else None
    if mask is None:
        return None
    bounds = [n for n in program.inputs() if _counts(n) and sites.reach.above(n, mask)]
    images, rows = (bounds[0].meta["val"].shape[0] - 1 if len(bounds) == 1 else None), product(packed.rows)
    return images // rows if isinstance(images, int) and isinstance(rows, int) and images % rows == 0 else None


def _counts(node: Node) -> bool:
    value = node.meta["val"]
    return value.ndim == 1 and not value.dtype.is_floating_point and value.dtype != torch.bool


def find_fold(program: Program, sites: Sites, axis: Dim) -> Fold | None:
    """How the patches of an axis become features; None where each is one, or where they do not become any."""
    made, axis = features(program, sites), resolve(axis)
    if made is None or not made.axis or made.axis == axis:
        return None
    shuffle = find_shuffle(program, axis)
    if shuffle is not None and made.packed:
        return Fold(axis, made.axis, shuffle)
    # What comes first in the patches comes first in the features: a column of features is then their patches in turn.
    inside = axis[:1] == made.axis[:1] and all(atom in axis for atom in made.axis)
    return Fold(axis, made.axis) if inside and all(isinstance(atom.size, int) for atom in axis) else None
