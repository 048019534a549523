"""Merge the pairs of tokens that are most alike, block by block: each token counts as many as it was made of."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch.fx import Node

from tokcompile.axes import Dim
from tokcompile.editing.keybias import bias_keys
from tokcompile.editing.tokenmap import map_of, note
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.insertplaces import leading_tokens
from tokcompile.passes.restore import restore
from tokcompile.program import place as node_place
from tokcompile.sites import Place
from tokcompile.sites.address import resolve_every
from tokcompile.sites.features import sequence
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


class _Merged:
    """What is known of the tokens that earlier blocks merged."""

    size: Node | None = None
    inverse: Node | None = None
    axis: Dim = ()


def merge_pairs(ctx: Context, step: Merge) -> None:
    """Merge in every block of the step's address, and let later attention count tokens by their size."""
    places = resolve_every(ctx.sites, step.at)
    counts = schedule(step.count, float(step.inflect), len(places))
    state, last = _Merged(), len(ctx.sites.stacks[places[0].owner].blocks)
    for number, count in enumerate(counts):
        block = places[number].block
        assert block is not None
        if state.size is not None and step.proportional and number:
            _weigh(ctx, step, state, places[0].owner, range(places[number - 1].block + 1, block + 1))
        _merge_at(ctx, step, resolve_every(ctx.sites, step.at)[number], count, state)
    if state.size is not None and step.proportional:
        _weigh(ctx, step, state, places[0].owner, range(places[-1].block + 1, last))
    if state.inverse is not None and step.restore:
        restore(ctx, state.inverse, state.axis, step)


def schedule(count: int | tuple[int, ...], inflect: float, blocks: int) -> list[int]:
    """How many pairs each block merges.

    A number is spread over the blocks from count * (1 - inflect) to count * (1 + inflect), each rounded down; a list
    holds for the first blocks, and the others merge none (the released code of "Token Merging").
    """
    if isinstance(count, tuple):
        return [*count[:blocks], *[0] * (blocks - len(count))]
    low = int(count * (1.0 - inflect))
    rise = Fraction(2 * count - 2 * low, max(blocks - 1, 1))
    return [max(int(low + rise * i), 0) for i in range(blocks)]


def _merge_at(ctx: Context, step: Merge, place: Place, wanted: int, state: _Merged) -> None:
    node, editor = place.node, ctx.editor
    at = sequence(ctx.program, ctx.sites, node)
    tokens = node.meta["val"].shape[1] if node.meta["val"].ndim == 3 else None
    if at is None or at.packed or not isinstance(tokens, int):
        raise EditError(
            "pairs are merged in a value [B, T, C] of a fixed number of tokens",
            where=[node_place(node)],
            found=f"{tuple(node.meta['val'].shape)}",
            remedy="compile with a static image size",
        )
    leading = (leading_tokens(at.axis) or 0) if step.protect == "leading" else 0
    count = min(wanted, max(tokens - leading, 0) // 2)
    ctx.log.append(
        {"verb": "merge", "at": place.address, "by": step.by, "from": str(tokens), "to": str(tokens - count)}
    )
    if count == 0:
        return
    with editor.after([node]):
        packed = editor.call(tokred.match_pairs.default, _metric(ctx, step, place), count, leading, name="pairs")
        note(editor, packed)
        stays, given, into = (
            editor.call(aten.slice.Tensor, packed, 1, start, end)
            for start, end in ((0, tokens - count), (tokens - count, tokens), (tokens, tokens + count))
        )
        like = editor.call(aten.select.int, node, -1, 0)
        token_map = map_of(editor, stays, like, at, tokens, tokens - count, step.positions, noted=False)
        lists = (token_map.source, given, into)
        content = editor.call(tokred.merge_pairs.default, node, state.size, *lists, True, name="merged")
        ones = editor.call(aten.ones_like.default, like, dtype=torch.float32)
        ones = editor.call(aten.unsqueeze.default, ones, -1)
        size = editor.call(tokred.merge_pairs.default, ones, state.size, *lists, False)
        size = editor.call(aten.squeeze.dim, size, -1)
        if step.restore:
            inverse = editor.call(tokred.inverse_map.default, *lists, like)
            if state.inverse is not None:
                inverse = editor.call(aten.gather.default, inverse, 1, state.inverse)
            state.inverse = inverse
    Transport(editor, ctx.sites).apply(node, token_map, content)
    state.size = size
    ctx.refresh()
    state.axis = ctx.program.axes.of(token_map.source)[1]


def _metric(ctx: Context, step: Merge, place: Place) -> Node:
    """[B, T, D]: what likeness is measured by."""
    if step.metric == "input":
        return place.node
    site = ctx.sites.stacks[place.owner].blocks[place.block].attention
    value = {"k": site.key, "q": site.query, "v": site.value}[step.metric]
    if step.metric == "k" and site.key_transposed:
        value = ctx.editor.call(aten.transpose.int, value, -2, -1)
    return ctx.editor.call(aten.mean.dim, value, [1])


def _weigh(ctx: Context, step: Merge, state: _Merged, owner: str, blocks: range) -> None:
    """Add the log of each key's size to the scores of some blocks (Bolya et al., "Token Merging", section 3)."""
    bias = None
    for number in blocks:
        site = ctx.sites.stacks[owner].blocks[number].attention
        if bias is None:
            with ctx.editor.after([state.size]):
                bias = ctx.editor.call(aten.log.default, state.size)
        bias_keys(ctx.editor, site, bias)
    if bias is not None:
        ctx.refresh()
