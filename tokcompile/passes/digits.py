"""rotate, by digits: what an encoder says of each position meets queries and keys in place of a rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.editing.edit import Editor
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.turned import refuse_fractions
from tokcompile.program import place as node_place
from tokcompile.rope.tables import heads_of, rows_of
from tokcompile.sites.attention import Attention, softmax_of
from tokcompile.sites.turns import Frequencies, Turn
from tokcompile.steps import Rotate

aten = torch.ops.aten
tokred = torch.ops.tokred
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PARTS = {aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


@dataclass(frozen=True, eq=False)
class Turned:
    """One rotation of queries or of keys.

    Attributes:
        before, after: [B, H, T, D] or [B, T, H, D].
        heads: the dimension that counts heads.
        turn: its product with cosines.
    """

    before: Node
    after: Node
    heads: int
    turn: Turn


def rotate_digits(ctx: Context, step: Rotate, found: list[Frequencies], record: dict[str, object]) -> None:
    """Delete the rotation, and let tables of positions meet queries and keys: SeqPE (2025), sections 3.1 and 3.3.

    The tables are parameters `q` [length, H, D] and `k` [length, Hkv, D], which `DigitEncoder` fills; they start as
    what changes nothing, so that queries and keys have no positions at all.

    Raises:
        EditError: the rotations of the stack are of a form that cannot be deleted.
    """
    record["how"] = step.how
    for each in found:
        refuse_fractions(ctx, each, step.at)
        tables = _Tables(ctx, step, each)
        rotations = {r.after: r for turn in each.turns if turn.wave == "cos" for r in [rotation(turn)]}
        for block in ctx.sites.stacks[step.address.stack].blocks:
            site, reach = block.attention, ctx.sites.reach
            own = [r for r in rotations.values() if reach.above(block.input, r.after)]
            query = next((r for r in own if reach.above(r.after, site.query)), None)
            key = next((r for r in own if reach.above(r.after, site.key)), None)
            own = [r for r in (query, key) if r is not None and r.after in rotations]
            for rotated in own:
                del rotations[rotated.after]
            if len(own) == 2:
                tables.meet(site, query, key)


def rotation(turn: Turn) -> Turned:
    """What a product with cosines is part of, from the value before to the value after, parts that are not turned too.

    Raises:
        EditError: it is of another form.
    """
    after = next((user for user in turn.node.users if user.target in _SUMS), None)
    if after is None:
        raise _unknown(turn)
    whole = next((u for u in after.users if u.target is aten.cat.default and _is_last(u)), None)
    after = after if whole is None else whole
    before = turn.value
    shape = tuple(after.meta["val"].shape)
    while tuple(before.meta["val"].shape) != shape:
        if before.target in _PARTS:
            before = before.args[0]
        elif before.op == "call_function" and before.target.__name__ == "getitem":
            before = before.args[0].args[0]
        else:
            raise _unknown(turn)
    return Turned(before, after, heads_of(turn), turn)


def _is_last(cat: Node) -> bool:
    dim = cat.args[1] if len(cat.args) > 1 else 0
    return dim % cat.meta["val"].ndim == cat.meta["val"].ndim - 1


def _unknown(turn: Turn) -> EditError:
    return EditError(
        "this rotation cannot be deleted",
        where=[node_place(turn.node)],
        found="queries and keys that are put together in another way than of turned parts and others",
        remedy="use it on models whose rotation takes a head as a whole, or its first part",
    )


class _Tables:
    """What positions say, for the queries and keys of one stack; layers share it."""

    def __init__(self, ctx: Context, step: Rotate, frequencies: Frequencies) -> None:
        self.ctx, self.step = ctx, step
        self.editor: Editor = ctx.editor
        self.positions: Node | None = None
        self.frequencies = frequencies
        self._made: dict[tuple[object, ...], Node] = {}

    def meet(self, site: Attention, query: Turned, key: Turned) -> None:
        """Let the positions meet one attention's queries and keys."""
        with self.editor.before(min((query.turn.node, key.turn.node), key=lambda n: n._sort_key)):
            tables = [self._table(name, r) for name, r in (("q", query), ("k", key))]
        if self.step.how == "scalar":
            readers = _readers(site)
            for rotated in (query, key):
                _whole_heads(rotated, site)
                self.editor.replace(rotated.after, rotated.before)
            self._join(site, key, readers, tables)
            return
        target = {"mul": aten.mul.Tensor, "add": aten.add.Tensor}[self.step.how]
        for rotated, table in zip((query, key), tables, strict=True):
            with self.editor.before(rotated.after):
                met = self.editor.call(target, rotated.before, table)
            self.editor.replace(rotated.after, met)

    def _table(self, name: str, rotated: Turned) -> Node:
        """Rows of a table for the tokens that a rotation has, in its form and dtype."""
        value = rotated.before.meta["val"]
        heads, width = int(value.shape[rotated.heads]), int(value.shape[-1])
        key = (name, rotated.turn.via, rotated.heads, value.dtype)
        if key not in self._made:
            rows = self._rows(name, heads, width, value)
            for source in rotated.turn.via:
                rows = self.editor.call(tokred.gather_tokens.default, rows, source, 1, 0)
            rows = self.editor.call(aten.to.dtype, rows, value.dtype)
            rows = self.editor.call(aten.transpose.int, rows, 1, 2) if rotated.heads == 1 else rows
            self._made[key] = rows
        return self._made[key]

    def _rows(self, name: str, heads: int, width: int, like: torch.Tensor) -> Node:
        """[B or 1, T, H, D]."""
        return self._looked_up(self._parameter(name, heads, width, like), self._positions())

    def _looked_up(self, table: Node, positions: Node) -> Node:
        flat = self.editor.call(aten.flatten.using_ints, table, 1, 2)
        rows = self.editor.call(aten.embedding.default, flat, positions)
        return self.editor.call(aten.unflatten.int, rows, 2, list(table.meta["val"].shape[1:]))

    def _parameter(self, name: str, heads: int, width: int, like: torch.Tensor) -> Node:
        start = torch.ones if self.step.how == "mul" else torch.zeros
        shape = (int(self.step.length), heads, width)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return self.editor.parameter(name, shape, lambda: start(shape, dtype=dtype, device=like.device))

    def _positions(self) -> Node:
        if self.positions is None:
            self.positions = rows_of(self.editor, self.frequencies)
            self._check(self.positions)
        return self.positions

    def _check(self, positions: Node) -> None:
        known = self.editor.call(aten.lt.Scalar, positions, int(self.step.length))
        self.editor.require(known, f"a position is past the {self.step.length} that the tables hold")

    def _join(self, site: Attention, key: Turned, readers: tuple[Node, Node], tables: list[Node]) -> None:
        """Put what positions say beside queries and keys: their products are added to the scores."""
        (reader, keys), (mine, theirs) = readers, tables
        query, held = reader.args[0], keys.args[1 if keys is reader else 0]
        rows = self.ctx.sites.phase == "prefill"
        with self.editor.before(reader):
            wide = self.editor.call(aten.cat.default, [query, self._expanded(query, mine)], -1)
        self.editor.swap_input(reader, query, wide)
        with self.editor.before(keys):
            beside = self._expanded(held, theirs if rows else self._cached(held, key))
            self.editor.swap_input(keys, held, self.editor.call(aten.cat.default, [held, beside], -1))
        if keys is not reader:
            keys.meta["val"] = self.editor.evaluate(keys)
        if site.node.target is aten.scaled_dot_product_attention.default:
            site.node.kwargs = {**site.node.kwargs, "scale": site.scale}

    def _expanded(self, value: Node, rows: Node) -> Node:
        """What positions say, [B or 1, H, T, D], for the rows and heads of queries or keys."""
        heads, own = value.meta["val"].shape[1], rows.meta["val"].shape[1]
        if heads != own:
            rows = self.editor.call(aten.repeat_interleave.self_int, rows, heads // own, 1)
        sizes = [self.editor.size(value, 0), -1, -1, -1]
        return self.editor.call(aten.expand.default, rows, sizes)

    def _cached(self, held: Node, key: Turned) -> Node:
        """Keys stand one after the other up to the new ones: a cache that was never cut holds the tokens before it."""
        if self.ctx.shortened:
            raise EditError(
                "scores that positions add to cannot go on from a cache that was cut",
                where=[node_place(held)],
                found="tokens whose positions the cache does not tell",
                remedy="use `how: mul` or `how: add`",
            )
        value = held.meta["val"]
        call = self.editor.call
        count = self.editor.size(held, 2)
        last = call(aten.slice.Tensor, self._positions(), 1, -1, 2**62)
        index = call(aten.arange.default, count, device=value.device)
        behind = call(aten.sub.Tensor, index, self.editor.arithmetic(lambda n: n - 1, count))
        places = call(aten.clamp.default, call(aten.add.Tensor, last, behind), 0)
        before = key.before.meta["val"]
        table = self._parameter("k", int(before.shape[key.heads]), int(before.shape[-1]), before)
        rows = call(aten.to.dtype, self._looked_up(table, places), value.dtype)
        return call(aten.transpose.int, rows, 1, 2)


def _whole_heads(rotated: Turned, site: Attention) -> None:
    """Refuse a rotation of other values than the attention's own queries and keys [B, H, T, D]."""
    if rotated.heads != 1 or rotated.before.meta["val"].shape[-1] != site.query.meta["val"].shape[-1]:
        raise _unknown(rotated.turn)


def _readers(site: Attention) -> tuple[Node, Node]:
    """The operators that read an attention's queries, and its keys.

    Raises:
        EditError: keys are transposed before they are rotated or cached.
    """
    if softmax_of(site) is None:
        return site.node, site.node
    product = next(u for u in site.query.users if u.target in (aten.matmul.default, aten.bmm.default))
    turned = product.args[1]
    if site.key_transposed or turned.target is not aten.transpose.int:
        raise EditError(
            "keys that are transposed early cannot be given more channels",
            where=[node_place(site.node)],
            remedy="load the model with fused attention (attn_implementation='sdpa')",
        )
    return product, turned
