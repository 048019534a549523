"""evict, with positions by rank: attention sees the keys of a cache as if they stood side by side.

Rotary attention depends on distances alone. So queries keep their positions, and keys are turned until each is as far
from the newest one as it is in the cache. After the prompt alone that is done once, to what is handed back; where every
step evicts, keys stay as they were made, and each step turns what it reads: rounding does not add up.

StreamingLLM (Xiao et al. 2024), section 3.2: positions within the cache.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.edit import sub
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.keystate import in_later_step, seen_keys, told_of_keys
from tokcompile.passes.turned import in_parts
from tokcompile.program import SIZES
from tokcompile.program import place as node_place
from tokcompile.sites import Block, resolve_caches, window_of
from tokcompile.sites.cache import TURNED, Cache
from tokcompile.sites.rotation import find_rotations
from tokcompile.sites.turns import Frequencies, find_turns
from tokcompile.tables import inverse_of, rows_of

aten = torch.ops.aten
PLACES = "places"


class Ranks:
    """The rotary positions of the keys of a decoder's caches."""

    def __init__(self, ctx: Context, at: str) -> None:
        self.ctx, self.at = ctx, at
        self.frequencies = find_turns(ctx.program, ctx.sites, "decoder")
        self.rotations = find_rotations(ctx.program, ctx.sites, "decoder")

    def places(self, block: Block) -> tuple[Node, Node, bool]:
        """Positions of a graph's own keys, int64 [B or 1, T], their frequencies, and whether pairs are neighbours.

        Raises:
            EditError: they have none, several, or were numbered anew.
        """
        ctx, rotation = self.ctx, self.rotations.get(block.attention)
        own = [each for each in self.frequencies if any(self._turns(turn.node, block) for turn in each.turns)]
        if rotation is None or len(own) != 1:
            raise self._refused(block, "no rotary positions" if rotation is None else f"{len(own)} kinds of positions")
        frequencies: Frequencies = own[0]
        turns = [turn for turn in frequencies.turns if self._turns(turn.node, block)]
        if in_parts(ctx, frequencies.angles) or len({turn.via for turn in turns}) > 1:
            raise self._refused(block, "positions in fractions, or queries and keys of several sequences")
        if any(turn.scale != 1 for turn in turns):
            raise self._refused(block, "rotations that also scale")
        editor = ctx.editor
        with editor.after([frequencies.angles, *turns[0].via]):
            own_places = rows_of(editor, frequencies)
            for source in turns[0].via:
                rows = [editor.size(source, 0), editor.size(own_places, 1)]
                own_places = editor.call(aten.expand.default, own_places, rows)
                own_places = editor.call(torch.ops.tokred.gather_tokens.default, own_places, source, 1, 0)
            return own_places, inverse_of(editor, frequencies), rotation.neighbours

    def _turns(self, node: Node, block: Block) -> bool:
        reach = self.ctx.sites.reach
        return reach.above(node, block.attention.query) and not reach.above(node, block.input)

    def _refused(self, block: Block, found: str) -> EditError:
        return EditError(
            "keys of this block cannot be numbered by their ranks in its cache",
            where=[self.at, node_place(block.attention.node)],
            found=found,
            remedy="positions: keep",
        )


def told_places(ranks: Ranks, index: int, block: Block, cache: Cache) -> Node:
    """Positions of all keys that a block reads, float32 [B, H, T]: whole numbers, exact below 2^24."""
    ctx = ranks.ctx
    own, _, _ = ranks.places(block)
    with ctx.editor.after([own, cache.key]):
        rows, heads, _ = (ctx.editor.size(cache.key, dim) for dim in range(3))
        wide = ctx.editor.call(aten.to.dtype, ctx.editor.call(aten.unsqueeze.default, own, 1), torch.float32)
        if not in_later_step(ctx):
            return ctx.editor.call(aten.expand.default, wide, [rows, heads, ctx.editor.size(cache.key, 2)])
        past = told_of_keys(ctx, index, cache, PLACES, "where its cached keys stood")
        new = ctx.editor.arithmetic(sub, ctx.editor.size(cache.key, 2), ctx.editor.size(cache.past, 2))
        wide = ctx.editor.call(aten.expand.default, wide, [rows, heads, new])
        old = ctx.editor.call(aten.slice.Tensor, past, 2, 0, ctx.editor.size(cache.past, 2))
        return ctx.editor.call(aten.cat.default, [old, wide], 2)


def turned(ctx: Context, ranks: Ranks, block: Block, keys: Node, places: Node, valid: Node | None) -> Node:
    """Keys turned until their distances to the last are those of their ranks.

    Args:
        keys: [B, H, T, D] at positions `places`, [B, H, T].
        valid: bool [B, T], real tokens; None: all are.
    """
    call = ctx.editor.call
    _, inverse, neighbours = ranks.places(block)
    with ctx.editor.after([n for n in (keys, places, valid, inverse) if n is not None]):
        if valid is None:
            order = call(aten.arange.default, ctx.editor.size(keys, 2), device=keys.meta["val"].device)
            order = call(aten.view.default, order, [1, 1, -1])
        else:
            order = call(aten.unsqueeze.default, call(aten.cumsum.default, valid, 1), 1)
        ahead = call(aten.sub.Tensor, places, order)
        last = call(aten.slice.Tensor, ahead, 2, -1, MAX)
        by = call(aten.sub.Tensor, last, ahead)
        return call(TURNED, keys, by, inverse, neighbours)


def hand_back_by_rank(ctx: Context, at: str, blocks: dict[int, tuple[Block, Node | None, Node | None]]) -> None:
    """Turn the keys that a prompt hands back to their ranks, once for all later steps.

    Args:
        blocks: each with the keys that stay, int64 [B, H, k], or None for all, and bool [B, T], which are real.
    """
    ranks = Ranks(ctx, at)
    for index, (block, stay, valid) in blocks.items():
        cache = ctx.sites.caches[block]
        if stay is None:
            continue
        places = told_places(ranks, index, block, Cache(cache.key.args[0], cache.value, cache.past))
        with ctx.editor.after([n for n in (cache.key, places, stay, valid) if n is not None]):
            places = ctx.editor.call(aten.gather.default, places, 2, stay)
            if valid is not None:  # every head has as much padding, in front
                valid = ctx.editor.call(aten.gather.default, valid, 1, ctx.editor.call(aten.select.int, stay, 1, 0))
        keys = turned(ctx, ranks, block, cache.key, places, valid)
        ctx.editor.swap_input(ctx.program.output, cache.key, keys)


def read_by_rank(ctx: Context, at: str) -> dict[int, Node]:
    """Let the attention of a later step read turned keys; what is handed back stays as it was.

    Returns:
        for each block the positions of all its keys, float32 [B, H, T].
    """
    ranks, found = Ranks(ctx, at), {}
    for index, block, cache in resolve_caches(ctx.sites, at):
        if window_of(block.attention, ctx.sites.reach) is not None:
            continue
        readers = [u for u in cache.key.users if u is not ctx.program.output and u.target not in SIZES]
        places = told_places(ranks, index, block, cache)
        site = block.attention
        mask = site.padding if site.padding is not None else site.mask
        with ctx.editor.after([n for n in (cache.key, mask) if n is not None]):
            valid = seen_keys(ctx, block, cache)
        keys = turned(ctx, ranks, block, cache.key, places, valid)
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
