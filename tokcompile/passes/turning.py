"""Turn queries and keys of some tokens by what a block's rotary tables hold for these."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.editing.edit import Editor, Length
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.rotation import Rotation

aten = torch.ops.aten
tokred = torch.ops.tokred
_MAX = 2**62


class Turning:
    """The rows of a rotation's tables for flagged tokens; without a rotation nothing is turned."""

    def __init__(self, editor: Editor, rotation: Rotation | None, flags: Node, stream: Node, count: Length) -> None:
        """Take the rows out.

        Args:
            flags: bool [B, T], the tokens.
            stream: [B, T, C], the sequence that they are of.
            count: how many each row has.

        Raises:
            EditError: the tables have other rows than one for each token of the sequence.
        """
        self.editor, self.rotation = editor, rotation
        self.cos, self.sin = (
            (None, None)
            if rotation is None
            else (self._rows(table, flags, stream, count) for table in (rotation.cos, rotation.sin))
        )

    def _rows(self, table: Node, flags: Node, stream: Node, count: Length) -> Node:
        """[B, M, H or 1, W], with a column for each number that is turned."""
        call, made, rank = self.editor.call, table, table.meta["val"].ndim
        if rank == 2:
            made = call(aten.unsqueeze.default, made, 0)
        if rank < 4:
            made = call(aten.unsqueeze.default, made, 2)
        elif self.rotation.heads == 1:
            made = call(aten.transpose.int, made, 1, 2)
        if not same(size_of(made.meta["val"].shape[1]), size_of(stream.meta["val"].shape[1])):
            raise EditError(
                "rotary tables have other rows than one for each token",
                where=[place(table)],
                found=f"{tuple(table.meta['val'].shape)} for {tuple(stream.meta['val'].shape)}",
            )
        rows = call(tokred.flagged_tokens.default, made, flags, stream, count)
        if not self.rotation.apart:
            return rows
        if self.rotation.neighbours:
            return call(aten.repeat_interleave.self_int, rows, 2, -1)
        return call(aten.cat.default, [rows, rows], -1)

    def turn(self, x: Node) -> Node:
        """Turn [B, M, H, D]: the first W numbers of each head, W the width of the tables; the others stay."""
        if self.rotation is None:
            return x
        call, dtype = self.editor.call, x.meta["val"].dtype
        width, head = self.cos.meta["val"].shape[-1], x.meta["val"].shape[-1]
        part = x if width == head else call(aten.slice.Tensor, x, -1, 0, width)
        own = call(aten.mul.Tensor, part, self.cos)
        turned = call(aten.add.Tensor, own, call(aten.mul.Tensor, self._partner(part), self.sin))
        if turned.meta["val"].dtype != dtype:
            turned = call(aten.to.dtype, turned, dtype)
        if width == head:
            return turned
        return call(aten.cat.default, [turned, call(aten.slice.Tensor, x, -1, width, _MAX)], -1)

    def _partner(self, x: Node) -> Node:
        """The other number of each pair, the second ones with their sign changed."""
        call, half = self.editor.call, x.meta["val"].shape[-1] // 2
        if self.rotation.neighbours:
            pairs = call(aten.unflatten.int, x, -1, [half, 2])
            one, two = (call(aten.select.int, pairs, -1, i) for i in (0, 1))
            stacked = call(aten.stack.default, [call(aten.neg.default, two), one], -1)
            return call(aten.flatten.using_ints, stacked, -2, -1)
        one, two = call(aten.slice.Tensor, x, -1, 0, half), call(aten.slice.Tensor, x, -1, half, _MAX)
        return call(aten.cat.default, [call(aten.neg.default, two), one], -1)
