"""Rotary tables made of other angles, in the form in which a model's products with queries and keys read them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.editing.edit import Editor
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.turns import Frequencies, Turn, heads_of

aten = torch.ops.aten
tokred = torch.ops.tokred


class Tables:
    """Tables of one kind of angles; products that need the same table share it."""

    def __init__(self, editor: Editor, angles: Node, strength: float = 1.0, passed: int = 0) -> None:
        """Prepare tables.

        Args:
            angles: float32 [B or 1, G, T, P]; G is 1, or the number of heads that have angles of their own.
            strength: what cosines and sines are multiplied by beside the model's own scale.
            passed: how many of the token maps that the model's tables went through the angles have been through: 0 for
                those of the tokens before all edits.
        """
        self.editor, self.angles = editor, angles
        self.strength, self.passed = strength, passed
        self._made: dict[tuple[object, ...], Node] = {}

    def give(self, turns: Iterable[Turn]) -> None:
        """Let products read the tables.

        Products of one kind of angles are given together: what they share is made in front of the first of them.

        Raises:
            EditError: a product reads its table in a form that cannot be made.
        """
        for turn in sorted(turns, key=lambda turn: turn.node._sort_key):
            with self.editor.before(turn.node):
                self.editor.swap_input(turn.node, turn.table, self._fitted(turn))

    def _fitted(self, turn: Turn) -> Node:
        """The table in the form of the old one: [B, H, T, W], [B, T, H, W], [B, T, W] or [T, W]."""
        rank, where = turn.table.meta["val"].ndim, heads_of(turn)
        table = self._columns(turn)
        self._check_tokens(turn, table, where)
        call = self.editor.call
        if rank == 4:
            table = self._for_heads(table, turn, where)
            return (
                self._once(("swapped", table), lambda: call(aten.transpose.int, table, 1, 2)) if where == 2 else table
            )
        rows = table.meta["val"].shape[0]
        lone = table.meta["val"].shape[1] == 1 and (rank == 3 or (isinstance(rows, int) and rows == 1))
        if rank not in (2, 3) or not lone:
            raise EditError(
                "rotary tables are shared where the new ones are not",
                where=[place(turn.node)],
                found=f"{tuple(turn.table.meta['val'].shape)} for angles {tuple(self.angles.meta['val'].shape)}",
                remedy="call the model with one row at a time",
            )
        for dim in (1, 0)[: 4 - rank]:
            table = self._once(("squeezed", table, dim), lambda t=table, d=dim: call(aten.squeeze.dim, t, d))
        return table

    def _check_tokens(self, turn: Turn, table: Node, where: int) -> None:
        value = turn.value.meta["val"]
        tokens = value.shape[2 if where == 1 else 1] if value.ndim == 4 else value.shape[-2]
        if not same(size_of(table.meta["val"].shape[2]), size_of(tokens)):
            raise EditError(
                "positions of a layer were numbered anew, and the new rotary tables are of other tokens",
                where=[place(turn.node)],
                found=f"tables of {table.meta['val'].shape[2]} tokens for {tokens}",
                remedy="use `positions: keep` in the drop before",
            )

    def _for_heads(self, table: Node, turn: Turn, where: int) -> Node:
        """Each group of heads that shares angles reads the same table."""
        own, heads = table.meta["val"].shape[1], turn.value.meta["val"].shape[where]
        if own in (1, heads):
            return table
        if heads % own:
            raise EditError(
                f"{heads} heads cannot share the angles of {own}",
                where=[place(turn.node)],
                found=f"{tuple(turn.value.meta['val'].shape)}",
            )
        repeat = self.editor.call
        return self._once(
            ("heads", table, heads), lambda: repeat(aten.repeat_interleave.self_int, table, heads // own, 1)
        )

    def _columns(self, turn: Turn) -> Node:
        """Cosines or sines [B, G, T, W], of the tokens that the product has."""
        call, pairs = self.editor.call, self.angles.meta["val"].shape[-1]
        wave = {"cos": aten.cos.default, "sin": aten.sin.default}[turn.wave]
        table = self._once((turn.wave,), lambda: call(wave, self.angles))
        scale = turn.scale * self.strength
        if scale != 1:
            table = self._once(("scaled", table, scale), lambda t=table: call(aten.mul.Tensor, t, scale))
        dtype = turn.table.meta["val"].dtype
        if table.meta["val"].dtype != dtype:
            table = self._once(("cast", table, dtype), lambda t=table: call(aten.to.dtype, t, dtype))
        every = tuple(range(pairs))
        if turn.pairs == every * 2:
            table = self._once(("twice", table), lambda t=table: call(aten.cat.default, [t, t], -1))
        elif turn.pairs == tuple(pair for pair in every for _ in range(2)):
            table = self._once(("each", table), lambda t=table: call(aten.repeat_interleave.self_int, t, 2, -1))
        elif turn.pairs != every:
            raise EditError(
                "rotary tables hold frequencies in an order that is not known",
                where=[place(turn.node)],
                found=f"{turn.pairs}",
            )
        for source in turn.via[self.passed :]:
            table = self._once(
                ("gathered", table, source), lambda t=table, s=source: call(tokred.gather_tokens.default, t, s, 2, 0)
            )
        return table

    def _once(self, key: tuple[object, ...], make: object) -> Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def rows_of(editor: Editor, frequencies: Frequencies) -> Node:
    """Whole positions of one coordinate, int64 [B or 1, T].

    Raises:
        EditError: a token has several.
    """
    value = frequencies.positions
    rank = value.meta["val"].ndim
    if frequencies.coordinates > 1 or rank > 3:
        raise EditError(
            "positions have several coordinates",
            where=[place(value)],
            found="an image's tokens stand in time, height and width, and do not count one by one",
            remedy="use it with models whose tokens count one by one; sections of coordinates take `by: slots`",
        )
    return editor.call(aten.squeeze.dim, coordinates_of(editor, frequencies), 0)


def coordinates_of(editor: Editor, frequencies: Frequencies) -> Node:
    """Whole positions, int64 [A, B or 1, T]."""
    value, where = frequencies.positions, frequencies.tokens
    rank = value.meta["val"].ndim
    if value.meta["val"].dtype != torch.int64:
        value = editor.call(aten.to.dtype, value, torch.int64)
    if rank > 1 and rank == frequencies.angles.meta["val"].ndim:
        beside = where + 1 if where + 1 < rank else where - 1
        value = editor.call(aten.squeeze.dim, value, beside)
    while value.meta["val"].ndim < 3:
        value = editor.call(aten.unsqueeze.default, value, 0)
    return value


def inverse_of(editor: Editor, frequencies: Frequencies) -> Node:
    """The frequencies, float32 [P].

    Raises:
        EditError: the model computes angles in half precision, which no position in fractions survives.
    """
    angles, value = frequencies.angles, frequencies.inverse
    if angles.meta["val"].dtype not in (torch.float32, torch.float64):
        raise EditError(
            "angles are computed in half precision",
            where=[place(angles)],
            found=str(angles.meta["val"].dtype),
            remedy="run the model without autocast around its rotary embedding",
        )
    dtype = angles.meta["val"].dtype
    return value if value.meta["val"].dtype == dtype else editor.call(aten.to.dtype, value, dtype)


def angles_of(editor: Editor, positions: Node, inverse: Node) -> Node:
    """Angles [B, 1, T, P] of positions [B, T], or of [B, T, P] with one for each frequency."""
    wide = positions
    if wide.meta["val"].ndim == 2:
        wide = editor.call(aten.unsqueeze.default, wide, 2)
    wide = editor.call(aten.to.dtype, wide, inverse.meta["val"].dtype)
    return editor.call(aten.unsqueeze.default, editor.call(aten.mul.Tensor, wide, inverse), 1)
