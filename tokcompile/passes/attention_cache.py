"""Keys and values of inserted tokens in an attention of their own, from a prompt to the steps that are given more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from tokcompile.decoding.carried import hand_on, length_of_call, take
from tokcompile.passes.context import Context

aten = torch.ops.aten
tokred = torch.ops.tokred
_HIDDEN = 2
"""Entries in front that nobody sees: so there are never fewer, and one graph serves any number of tokens."""
_PARTS = ("key", "value", "seen")


class AttentionCache:
    """A second, small cache, of the blocks of one layer.

    A block's keys and values are [B, H, P, D], its flags bool [B, P]: rows may have different numbers of tokens. P is
    another number in each call: the graph of a step is compiled for all of them.
    """

    def __init__(self, ctx: Context, layer: str) -> None:
        """Begin one in a prompt's graph; in a later step's, go on with what earlier graphs handed on."""
        self.ctx, self.layer = ctx, layer
        self.later = ctx.sites.phase == "decode"
        self._length: torch.SymInt | None = None

    @property
    def kept(self) -> bool:
        """Whether a later step can go on from what this graph hands on."""
        return self.ctx.program.carried is not None and bool(self.ctx.sites.caches)

    def past(self, block: int, heads: int, width: int, like: Node) -> Mapping[str, Node]:
        """What earlier graphs handed on of a block; nothing in a prompt. `like` is the stream, [B, T, C]."""
        if not self.later:
            return {}
        if self._length is None:
            self._length = length_of_call(self.ctx.program)
        value = like.meta["val"]
        with self.ctx.program.fake_mode:
            keys = value.new_empty(value.shape[0], heads, self._length, width)
            seen = value.new_empty(value.shape[0], self._length, dtype=torch.bool)
        fakes = {"key": keys, "value": keys.clone(), "seen": seen}
        what = "keys and values of the inserted tokens"
        return {part: take(self.ctx.program, self._name(block, part), fakes[part], what) for part in _PARTS}

    def attend(
        self, block: int, past: Mapping[str, Node], query: Node, key: Node, value: Node, seen: Node | None
    ) -> Node:
        """[B, H, M, D]: each of M tokens sees those of the past, those before it, and itself.

        Args:
            query, key, value: [B, H, M, D].
            seen: bool [B, M], which of them are tokens that later ones may see; None where no later ones can.
        """
        call = self.ctx.editor.call
        given = {"key": key, "value": value} | ({} if seen is None else {"seen": seen})
        if past:
            whole = {p: call(aten.cat.default, [past[p], given[p]], 1 if p == "seen" else 2) for p in _PARTS}
            out = call(tokred.attend_after.default, query, whole["key"], whole["value"], past["seen"])
            self._hand_on(block, whole)
            return out
        if seen is not None:
            self._hand_on(block, {p: self._padded(given[p], 1 if p == "seen" else 2) for p in _PARTS})
        return call(aten.scaled_dot_product_attention.default, query, key, value, None, 0.0, True)

    def begin_empty(self, block: int, heads: int, width: int, like: Node) -> None:
        """Hand on that a prompt has no inserted tokens in a block; `like` is the stream."""
        call, rows = self.ctx.editor.call, self.ctx.editor.size(like, 0)
        none = call(aten.new_zeros.default, like, [rows, heads, _HIDDEN, width])
        seen = call(aten.new_zeros.default, like, [rows, _HIDDEN], dtype=torch.bool)
        self._hand_on(block, {"key": none, "value": none, "seen": seen})

    def _padded(self, value: Node, dim: int) -> Node:
        behind = value.meta["val"].ndim - 1 - dim
        return self.ctx.editor.call(aten.constant_pad_nd.default, value, [0, 0] * behind + [_HIDDEN, 0])

    def _hand_on(self, block: int, values: Mapping[str, Node]) -> None:
        for part, value in values.items():
            hand_on(self.ctx.program, self._name(block, part), value)

    def _name(self, block: int, part: str) -> str:
        return f"{self.ctx.editor.rule}_{self.layer}_{block}_{part}"
