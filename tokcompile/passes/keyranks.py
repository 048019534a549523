"""evict, with positions by rank: attention sees the keys of a cache as if they stood side by side.

Rotary attention depends on distances alone. So queries keep their positions, and keys are turned until each is as far
from the newest one as it is in the cache. After the prompt alone that is done once, to what is handed back; where every
step evicts, keys stay as they were made, and each step turns what it reads: rounding does not add up.

StreamingLLM (Xiao et al. 2024), section 3.2: positions within the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.editing.edit import sub
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.keystate import in_later_step, seen_keys, told_of_keys
from tokcompile.passes.ranked import turnable
from tokcompile.program import SIZES
from tokcompile.program import place as node_place
from tokcompile.rope.tables import coordinates_of
from tokcompile.sites import Block, resolve_caches, window_of
from tokcompile.sites.cache import SHORTENED, TURNED, Cache, unrepeated
from tokcompile.sites.turns import Turn

aten = torch.ops.aten
PLACES = "places"


class Ranks:
    """The rotations of the keys in a decoder's caches, as they are before any is shortened."""

    def __init__(self, ctx: Context, at: str) -> None:
        """Find them.

        Raises:
            EditError: a block's cached keys are not turned, or not in a way that can be undone.
        """
        self.ctx, self.pairings = ctx, {}
        found = [(i, b, c) for i, b, c in resolve_caches(ctx.sites, at) if not _windowed(ctx, b)]
        self.pairings = turnable(ctx, at, [block for _, block, _ in found], several=True)
        for index, block, cache in found:
            sources = {turn.via for turn in self._turns(index, block)}
            if unrepeated(block.attention.key, cache.key) is None or len(sources) != 1:
                raise EditError(
                    "what this cache holds are not the keys that attention reads",
                    where=[at, node_place(cache.key)],
                    found=f"{tuple(cache.key.meta['val'].shape)}",
                    remedy="positions: keep",
                )

    def _turns(self, index: int, block: Block) -> list[Turn]:
        reach = self.ctx.sites.reach
        turns = self.pairings[index].frequencies.turns
        return [t for t in turns if reach.above(t.node, block.attention.query) and reach.above(block.input, t.value)]

    def places(self, index: int, block: Block) -> list[Node]:
        """Positions of a graph's own tokens in a block, int64 [B or 1, T], for each coordinate of a token."""
        frequencies, via = self.pairings[index].frequencies, self._turns(index, block)[0].via
        editor, found = self.ctx.editor, []
        with editor.after([frequencies.angles, *via]):
            every = coordinates_of(editor, frequencies)
            for coordinate in range(frequencies.coordinates):
                own = editor.call(aten.select.int, every, 0, coordinate)
                for source in via:
                    own = editor.call(aten.expand.default, own, [editor.size(source, 0), editor.size(own, 1)])
                    own = editor.call(torch.ops.tokred.gather_tokens.default, own, source, 1, 0)
                found.append(own)
        return found

    def turned(self, index: int, keys: Node, places: Sequence[Node], valid: Node | None) -> Node:
        """Keys turned until their distances to the last are those of their ranks, in each coordinate.

        Args:
            keys: [B, H, T, D] at positions `places`, [B, H, T] for each coordinate.
            valid: bool [B, T], real tokens; None: all are.
        """
        call, pairing = self.ctx.editor.call, self.pairings[index]
        inverse = pairing.frequencies.inverse
        with self.ctx.editor.after([n for n in (keys, *places, valid, inverse) if n is not None]):
            if valid is None:
                order = call(aten.arange.default, self.ctx.editor.size(keys, 2), device=keys.meta["val"].device)
                order = call(aten.view.default, order, [1, 1, -1])
            else:
                order = call(aten.unsqueeze.default, call(aten.cumsum.default, valid, 1), 1)
            how: list[object] = [pairing.start, pairing.neighbours]
            here = places[0]
            if len(places) > 1:
                here, order = call(aten.stack.default, list(places), -1), call(aten.unsqueeze.default, order, -1)
                how.append(list(pairing.coordinates))
            ahead = call(aten.slice.Tensor, call(aten.sub.Tensor, here, order), 2, -1, MAX)
            there = call(aten.add.Tensor, ahead, order)
            return call(TURNED, keys, here, there, inverse, *how)


def _windowed(ctx: Context, block: Block) -> bool:
    return window_of(block.attention, ctx.sites.reach) is not None


def told_places(ranks: Ranks, index: int, block: Block, cache: Cache) -> dict[str, Node]:
    """Positions of all keys that a block reads, float32 [B, H, T]: whole numbers, exact below 2^24.

    Returns:
        one for each coordinate of a token, in order, by the name under which it is handed on.
    """
    own = ranks.places(index, block)
    names = [PLACES] if len(own) == 1 else [f"{PLACES}{coordinate}" for coordinate in range(len(own))]
    return {name: _told(ranks.ctx, index, cache, name, each) for name, each in zip(names, own, strict=True)}


def _told(ctx: Context, index: int, cache: Cache, name: str, own: Node) -> Node:
    with ctx.editor.after([own, cache.key]):
        rows, heads, _ = (ctx.editor.size(cache.key, dim) for dim in range(3))
        wide = ctx.editor.call(aten.to.dtype, ctx.editor.call(aten.unsqueeze.default, own, 1), torch.float32)
        if not in_later_step(ctx):
            return ctx.editor.call(aten.expand.default, wide, [rows, heads, ctx.editor.size(cache.key, 2)])
        past = told_of_keys(ctx, index, cache, name, "where its cached keys stood")
        new = ctx.editor.arithmetic(sub, ctx.editor.size(cache.key, 2), ctx.editor.size(cache.past, 2))
        wide = ctx.editor.call(aten.expand.default, wide, [rows, heads, new])
        old = ctx.editor.call(aten.slice.Tensor, past, 2, 0, ctx.editor.size(cache.past, 2))
        return ctx.editor.call(aten.cat.default, [old, wide], 2)


def hand_back_by_rank(
    ranks: Ranks, index: int, block: Block, cache: Cache, stay: Node | None, valid: Node | None
) -> None:
    """Turn the keys that a prompt hands back to their ranks, once for all later steps.

    Args:
        cache: as it was before it was shortened.
        stay: the keys that do, int64 [B, H, k]; None: all.
        valid: bool [B, T], which are real; None: all are.
    """
    if stay is None:
        return
    ctx = ranks.ctx
    short = next(node for node in cache.key.users if node.target in SHORTENED)
    every = told_places(ranks, index, block, cache).values()
    with ctx.editor.after([n for n in (short, *every, stay, valid) if n is not None]):
        places = [ctx.editor.call(aten.gather.default, each, 2, stay) for each in every]
        if valid is not None:  # every head has as much padding, in front
            valid = ctx.editor.call(aten.gather.default, valid, 1, ctx.editor.call(aten.select.int, stay, 1, 0))
    ctx.editor.swap_input(ctx.program.output, short, ranks.turned(index, short, places, valid))


def read_by_rank(ctx: Context, at: str) -> dict[int, dict[str, Node]]:
    """Let the attention of a later step read turned keys; what is handed back stays as it was.

    Returns:
        for each block what `told_places` tells of its keys.
    """
    ranks, found = Ranks(ctx, at), {}
    for index, block, cache in resolve_caches(ctx.sites, at):
        if _windowed(ctx, block):
            continue
        readers = [u for u in cache.key.users if u is not ctx.program.output and u.target not in SIZES]
        places = told_places(ranks, index, block, cache)
        site = block.attention
        mask = site.padding if site.padding is not None else site.mask
        with ctx.editor.after([n for n in (cache.key, mask) if n is not None]):
            valid = seen_keys(ctx, block, cache)
        keys = ranks.turned(index, cache.key, list(places.values()), valid)
        late = [user for user in readers if user._sort_key < keys._sort_key]
        if late:
            raise EditError(
                "keys are read before the mask of this attention is made",
                where=[at, node_place(late[0])],
                remedy="load the model with fused attention, or positions: keep",
            )
        for user in readers:
            ctx.editor.swap_input(user, cache.key, keys)
        found[index] = places
    ctx.refresh()
    return found
