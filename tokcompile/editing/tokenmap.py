"""What an edit does to a sequence: for each new token the old one that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim
from tokcompile.axes.context import MAX
from tokcompile.editing.edit import Editor, Length
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
        fresh: bool [B, T'], the tokens that stand for no old one; `source` is then an old token near by. None where
            there are none.
        inverse: int64 [B, T], where each old token went; known where there are fresh ones.
        silent: whether fresh tokens have no position.
        following: whether the positions of fresh tokens go on from that of the token before them, one by one.
        run: the place of the first fresh token and how many follow it, where they stand together at the same place in
            all rows.
        filled: bool [B, T'], the new tokens that are any: others are empty slots in front; None where all are.
        stand_ins: bool [B, T'], new tokens that stand at the place of an old one, and are not it.
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
    fresh: Node | None = None
    inverse: Node | None = None
    silent: bool = False
    following: bool = False
    run: tuple[Length, int] | None = None
    filled: Node | None = None
    stand_ins: Node | None = None


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


def slots_of(via: Node) -> Node | None:
    """The slots, as `mark_slots` lists them, that a token map's indices name places for; None for another map."""
    return via.args[0] if via.target is tokred.slot_source.default else None


def marked_map(editor: Editor, runs: Node, at: Sequence, old: Length, slots: Length) -> TokenMap:
    """Build the map that puts one token in place of each run of some, within a number of slots.

    Args:
        runs: bool [B, T], the tokens that are replaced.
        at: the old sequence.
    """
    held = editor.call(tokred.mark_slots.default, runs, slots, name="slots")
    note(editor, held)
    source = editor.call(tokred.slot_source.default, held, runs, name="source")
    filled = editor.call(aten.ne.Scalar, held, -1, name="filled")
    fresh = editor.call(aten.lt.Scalar, held, 0, name="fresh")
    following = editor.call(aten.slice.Tensor, runs, 1, 1, MAX)
    following = editor.call(aten.constant_pad_nd.default, following, [0, 1], False)
    inside = editor.call(aten.logical_and.default, runs, following)
    keep = editor.call(aten.logical_not.default, inside)
    count = editor.call(aten.sum.dim_IntList, keep, [1])
    editor.require(
        editor.call(aten.le.Scalar, count, slots),
        "image tokens stand in more stretches between text than the mark step has slots for: give it `spans`",
    )
    return TokenMap(at.axis, at.rows, source, keep, old, slots, filled=filled, stand_ins=fresh)
