"""layer, by attention: after each block's own attention, inserted tokens attend to each other."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim
from tokcompile.errors import EditError
from tokcompile.passes.attention_cache import AttentionCache
from tokcompile.passes.context import Context
from tokcompile.passes.insertplaces import Slots
from tokcompile.passes.learned import Learned
from tokcompile.passes.turning import Turning
from tokcompile.program import SIZES
from tokcompile.program import place as node_place
from tokcompile.sites.address import Place, resolve_every
from tokcompile.sites.attention import Attention
from tokcompile.sites.rotation import Rotation, find_rotations
from tokcompile.steps import Layer

aten = torch.ops.aten
tokred = torch.ops.tokred


def add_attention(ctx: Context, step: Layer, record: dict[str, object]) -> None:
    """h + Attention(Norm(h)) for the tokens of an insert step among themselves, each seeing those before it.

    Meta-attention of "Language Modeling with Learned Meta-Tokens" (2025), in its compact form: the M inserted rows are
    taken out, attend causally, and are added back, so that all others get exactly nothing. Queries, keys, values and
    the output have maps of their own, as many heads as the block's queries, and no biases. Queries and keys are turned
    by what the block's own rotary tables hold at their places. The output's map starts as zeros: an untrained layer
    changes no bit.

    Which rows are inserted is read from their flags in each block, so that edits of other rules, before or after, may
    leave fewer of them.

    A step after the prompt that is given more of these tokens lets them attend to those of the prompt, whose keys and
    values are kept beside the model's own cache.

    Raises:
        EditError: the tokens are not there, or the blocks have no layout that is known.
    """
    slots: Slots = ctx.values[step.of]
    places = resolve_every(ctx.sites, step.at)
    record["of"] = step.of
    cache = AttentionCache(ctx, step.name)
    if slots.fresh is None:
        if cache.kept:
            _begin_empty(ctx, step, places, cache)
        record |= {"blocks": 0, "note": f"'{step.of}' inserts no tokens: no edit"}
        return
    chosen = _blocks(ctx, step, places, slots)
    record["blocks"] = len(chosen)
    if not chosen:
        record["note"] = "no block has the layer: no edit"
        return
    rotations = find_rotations(ctx.program, ctx.sites, chosen[0].owner)
    flags: dict[Dim, Node] = {}
    record["parameters"] = sum(_add(ctx, step, place, slots, rotations, flags, cache) for place in chosen)
    ctx.refresh()


def _begin_empty(ctx: Context, step: Layer, places: list[Place], cache: AttentionCache) -> None:
    """Tell the steps after a prompt without tokens that there are none: they may be given some."""
    count = len(places) if step.blocks is None else int(step.blocks)
    for place in places[:count]:
        if place.owner == "decoder" and _rank(place) == 3:
            _, heads, _, width = _site(ctx, place).query.meta["val"].shape
            with ctx.editor.after([place.node]):
                cache.begin_empty(place.block or 0, heads, width, place.node)


def _blocks(ctx: Context, step: Layer, places: list[Place], slots: Slots) -> list[Place]:
    """The places that have the layer: the first of those that hold the tokens."""
    axis = ctx.program.axes.of(slots.fresh)[1]
    holding = [p for p in places if _rank(p) == 3 and ctx.leads(axis, ctx.program.axes.of(p.node)[1])]
    if not holding:
        raise EditError(
            f"the tokens '{step.of}' are not among those of this place, so that they cannot attend here",
            where=[step.at, *(node_place(p.node) for p in places[:1])],
            found=f"{tuple(places[0].node.meta['val'].shape)}" if places else "no block that the model uses",
            remedy="an address between that of the insert step and its 'until'",
        )
    if step.blocks is None:
        return holding
    if int(step.blocks) > len(holding):
        raise EditError(
            "a layer is asked for in more blocks than hold its tokens",
            where=[step.at],
            found=f"blocks: {step.blocks}, and {len(holding)} with the tokens '{step.of}'",
            remedy=f"blocks: {len(holding)}, or leave it out",
        )
    return holding[: int(step.blocks)]


def _rank(place: Place) -> int:
    return place.node.meta["val"].ndim


def _site(ctx: Context, place: Place) -> Attention:
    """The block's own attention, whose heads the layer has.

    Raises:
        EditError: its queries are not [B, H, T, D] with known heads and widths.
    """
    block = ctx.sites.stacks[place.owner].blocks[place.block or 0]
    shape = block.attention.query.meta["val"].shape
    known = len(shape) == 4 and all(isinstance(shape[dim], int) for dim in (1, 3))
    if known and isinstance(place.node.meta["val"].shape[-1], int):
        return block.attention
    raise EditError(
        "the heads of a block are not known, and so neither those of a layer after it",
        where=[place.address, node_place(block.attention.node)],
        found=f"queries {tuple(shape)}",
        remedy="use it on blocks whose queries are [B, H, T, D], compiled with a static number of heads",
    )


def _add(
    ctx: Context,
    step: Layer,
    place: Place,
    slots: Slots,
    rotations: dict[Attention, Rotation],
    flags: dict[Dim, Node],
    cache: AttentionCache,
) -> int:
    """Put the layer in at one place, and return how many parameters it has; blocks of the same tokens share flags."""
    node, site, call = place.node, _site(ctx, place), ctx.editor.call
    users = [u for u in node.users if u.target not in SIZES]
    _, heads, _, width = site.query.meta["val"].shape
    past = cache.past(place.block or 0, heads, width, node)
    rotation = rotations.get(site)
    needed: list[Node] = [node, slots.fresh, *([slots.count] if isinstance(slots.count, Node) else [])]
    if rotation is not None:
        needed += [rotation.cos, rotation.sin]
    with ctx.editor.after(needed):
        axis = ctx.program.axes.of(node)[1]
        if axis not in flags:
            flags[axis] = slots.fresh if cache.later else _flags(ctx, slots.fresh, axis)
        learned = Learned(ctx.editor, f"{step.name}_{place.block}", node, float(step.std))
        rows = call(tokred.flagged_tokens.default, node, flags[axis], node, slots.count)
        turning = Turning(ctx.editor, rotation, flags[axis], node, slots.count)
        query, key, value = _heads(ctx, learned, learned.norm(step.norm, rows), site, turning)
        handed = cache.later or cache.kept
        seen = call(tokred.listed_tokens.default, node, flags[axis], slots.count) if handed else None
        out = cache.attend(place.block or 0, past, query, key, value, seen)
        out = call(aten.flatten.using_ints, call(aten.transpose.int, out, 1, 2), 2, 3)
        more = learned.linear("output", out, int(node.meta["val"].shape[-1]), fill=0.0)
        added = call(tokred.add_tokens.default, node, flags[axis], more, name=step.name)
    for user in users:
        ctx.editor.swap_input(user, node, added)
    return learned.size


def _flags(ctx: Context, fresh: Node, axis: Dim) -> Node:
    """bool [B, T]: inserted tokens. One among what pads a row is hidden as that is: it sees none, and none sees it."""
    flags = ctx.align(fresh, ctx.program.axes.of(fresh)[1], axis)
    valid = ctx.valid_mask(axis)
    return flags if valid is None else ctx.editor.call(aten.logical_and.default, flags, valid)


def _heads(ctx: Context, learned: Learned, rows: Node, site: Attention, turning: Turning) -> list[Node]:
    """Queries, keys and values of M tokens, [B, H, M, D] each."""
    call = ctx.editor.call
    _, heads, _, width = site.query.meta["val"].shape
    made = []
    for part in ("query", "key", "value"):
        each = learned.linear(part, rows, heads * width)
        each = call(aten.unflatten.int, each, -1, [heads, width])
        each = each if part == "value" else turning.turn(each)
        made.append(call(aten.transpose.int, each, 1, 2))
    return made
