"""What an edit does to a sequence: for each new token the old one that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim
from tokcompile.edit import Editor, Length
from tokcompile.sites.features import Sequence, Shuffle

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class TokenMap:
    """What one edit does to a sequence.

    Attributes:
        axis, rows: atoms of the old token axis and of the batch rows (`()` for a batch of one).
        source: int64 [B, T']: the old token that each new one stands for.
        keep: bool [B, T]: the old tokens that stay.
        old, new: T and T'.
        positions: `keep` or `compact`, what happens to rotary coordinates.
        parent: the map that this one follows from; None for a map that a pass made.
        part: the map of a sequence that this one's is a range of, and how many tokens of it are before and after.
        reordered: the axis is an order that the model sorts tokens into: computed anew on the tokens that are left, so
            that no value made for the old tokens fits it, and `source` and `keep` are those of the parent.
        thin: the axis is one of features that the model makes of rows and columns of patches: what stays of it is a
            column of features, so that the first factor of the axis counts all that stay, and the others are 1.
        folded: of patches, the map of the features that they become.
        shuffle: of groups of patches, how they stand in another order than the features that they become.
        numbers: the features that the groups that stay become, as the shuffle numbers them.
        spliced: of a text, the map of the features that are spliced into it.
        ascending: whether `source` lists tokens in the order of their places.
        placed: int64 [B, T'], where the tokens of a text take their positions from, if that is not `source`: features
            that stand in another order than their places.
    """

    axis: Dim
    rows: Dim
    source: Node
    keep: Node
    old: Length
    new: Length
    positions: str = "keep"
    parent: TokenMap | None = None
    part: tuple[TokenMap, int, int] | None = None
    reordered: bool = False
    thin: bool = False
    folded: TokenMap | None = None
    shuffle: Shuffle | None = None
    numbers: Node | None = None
    spliced: TokenMap | None = None
    ascending: bool = True
    placed: Node | None = None


def make_map(editor: Editor, keep: Node, axis: Any, rows: Any, old: Any, new: Any, positions: str) -> TokenMap:
    """Build a map from a keep mask, and check at run time that every row keeps as many tokens as the map says."""
    kept = editor.call(aten.sum.dim_IntList, keep, [1])
    editor.require(editor.call(aten.eq.Scalar, kept, new), "batch rows hold different numbers of image tokens")
    indices = editor.call(tokred.kept_indices.default, keep, new, name="kept")
    note(editor, indices)
    return TokenMap(axis, rows, indices, keep, old, new, positions)


def note(editor: Editor, indices: Node) -> None:
    """Name indices that a rule chose, so that a recording can hold them and a replay give them back."""
    indices.meta["token_map"] = f"{editor.rule}/{sum('token_map' in n.meta for n in editor.program.graph.nodes)}"


def map_of(
    editor: Editor, index: Node, like: Node, at: Sequence, old: Length, new: Length, positions: str, noted: bool = True
) -> TokenMap:
    """Build a map from indices in any order, no two of a row alike.

    Args:
        index: int64 [B, T'], the old token that each new one stands for.
        like: a value [B, T] of the old sequence.
        at: the old sequence.
        noted: whether the map is what a recording holds; else the caller notes what it is made from.
    """
    source = editor.call(tokred.token_source.default, index, like, name="source")
    if noted:
        note(editor, source)
    nothing = editor.call(aten.zeros_like.default, like, dtype=torch.bool)
    keep = editor.call(aten.scatter.value, nothing, 1, source, True)
    return TokenMap(at.axis, at.rows, source, keep, old, new, positions, ascending=False)
