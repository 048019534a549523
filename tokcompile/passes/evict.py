"""evict: shorten the caches that a prompt leaves, or that a later step does."""

from __future__ import annotations

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.decoding.carried import evicted_name, hand_on, owners_name, padding_name
from tokcompile.decoding.placetables import is_biased
from tokcompile.editing.edit import length_value
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.jointheads import check_joint
from tokcompile.passes.keychoice import BlockKeys, KeySelection
from tokcompile.passes.keymerge import BlockMerge, KeyMerge
from tokcompile.passes.keyranks import PLACES, Ranks, hand_back_by_rank, told_places
from tokcompile.passes.keystate import hand_on_state, in_later_step
from tokcompile.program import place
from tokcompile.sites import Block
from tokcompile.sites.cache import handed_back
from tokcompile.steps import Evict, Score, Select

tokred = torch.ops.tokred


def evict(ctx: Context, step: Evict) -> None:
    """Let the graph hand back the chosen keys and values alone; what runs now attends to all of them."""
    if step.when != "prefill":
        _check_later(ctx, step)
    if _choice(ctx, step).heads == "joint":
        check_joint(ctx, step)
    selection: KeySelection = ctx.values[step.keep]
    if step.when == "decode" and not in_later_step(ctx):
        _only_tell(ctx, step, selection)
        return
    blocks = ctx.sites.stacks["decoder"].blocks
    _check_biases(ctx, [blocks[index] for index in selection.blocks])
    places = _places(ctx, step, selection)
    once = Ranks(ctx, step.at) if step.positions == "rank" and step.when == "prefill" else None
    outputs = list(ctx.program.output.all_input_nodes)
    merged: KeyMerge | None = ctx.values.get(step.merged or "")
    held = {index: handed_back(blocks[index], ctx.sites.reach, outputs) for index in selection.blocks}
    for index, chosen in selection.blocks.items():
        if chosen.index is not None:
            _shorten(ctx, held[index], chosen, merged.blocks[index] if merged else None)
        if once is not None:
            cache = ctx.sites.caches[blocks[index]]
            hand_back_by_rank(once, index, blocks[index], cache, chosen.index, chosen.valid)
        if step.when != "prefill":
            hand_on_state(ctx, index, chosen.state.with_keys(**places[index]), chosen.index)
        if chosen.padding is not None:
            hand_on(ctx.program, padding_name(index), chosen.padding)
        if chosen.owners is not None:
            hand_on(ctx.program, owners_name(index), chosen.owners)
        if chosen.evicted is not None:
            hand_on(ctx.program, evicted_name(index), chosen.evicted)
    each = selection.blocks.values()
    record = {
        "verb": "evict",
        "at": step.at,
        "keep": step.keep,
        "from": _spelled(length_value(b.size) for b in each),
        "to": _spelled(length_value(b.count) for b in each),
    }
    if step.merged:
        record["merged"] = step.merged
    if selection.windowed:
        record["note"] = f"blocks {', '.join(map(str, selection.windowed))} keep what their window does"
    ctx.log.append(record)
    ctx.refresh()


def _places(ctx: Context, step: Evict, selection: KeySelection) -> dict[int, dict[str, Node]]:
    """What later steps that number keys by rank are told of each block's: their positions."""
    none: dict[int, dict[str, Node]] = {index: {} for index in selection.blocks}
    if step.positions == "keep" or step.when == "prefill":
        return none
    if in_later_step(ctx):
        return dict(ctx.values[PLACES])
    blocks, ranks = ctx.sites.stacks["decoder"].blocks, Ranks(ctx, step.at)
    each = {index: (blocks[index], ctx.sites.caches[blocks[index]]) for index in selection.blocks}
    return {index: told_places(ranks, index, *found) for index, found in each.items()}


def _only_tell(ctx: Context, step: Evict, selection: KeySelection) -> None:
    """Leave a prompt's caches whole, and tell later steps what they need of them."""
    places = _places(ctx, step, selection)
    for index, chosen in selection.blocks.items():
        hand_on_state(ctx, index, chosen.state.with_keys(**places[index]), None)
    ctx.log.append({"verb": "evict", "at": step.at, "keep": step.keep, "note": "later steps evict"})
    ctx.refresh()


def _choice(ctx: Context, step: Evict) -> Select:
    return next(s for s in ctx.instance.steps if isinstance(s, Select) and s.name == step.keep)


def _check_later(ctx: Context, step: Evict) -> None:
    """Refuse what later steps cannot choose by."""
    choice = _choice(ctx, step)
    scores = next(s for s in ctx.instance.steps if isinstance(s, Score) and s.name == choice.scores)
    alone = step.when == "decode"
    wrong = {
        f"scores by: {scores.by}": scores.by == "joined",
        f"queries: {scores.queries}": scores.voters is not None,
        f"among: {choice.among}": choice.among != "all",
        f"taper: {choice.taper}": int(choice.taper) != 1,
        f"heads: {choice.heads}": choice.heads != "each",
        f"keep: {choice.keep}": alone and ctx.instance.is_share(choice),
        f"by: {choice.by}": alone and choice.by == "pairwise",
    }
    found = next((text for text, here in wrong.items() if here), None)
    if found is not None:
        raise EditError(
            "later steps cannot evict by this choice",
            where=[ctx.instance.place(choice)],
            found=f"{found}, with when: {step.when}",
            remedy="when: prefill, or a choice among all tokens by scores of their own, with a count and equal budgets",
        )


def _check_biases(ctx: Context, blocks: list[Block]) -> None:
    """Refuse blocks whose later steps count from the cache how far away a key is."""
    for block in blocks:
        if is_biased(ctx.program, ctx.sites, block.attention):
            raise EditError(
                "keys cannot be evicted where attention adds a bias to its scores: later steps count distances from "
                "the cache",
                where=[place(block.attention.node)],
                remedy="use a model with rotary positions, or a table that position_ids pick from",
            )


def _spelled(lengths: object) -> str:
    return ", ".join(dict.fromkeys(map(str, lengths)))


def _guarded(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two lengths are equal in the call that is compiled; the graph then runs for such calls alone.

    Dynamo may give keys and values of one cache lengths of their own.
    """
    backed = all(isinstance(n, torch.SymInt) and not free_unbacked_symbols(n) for n in (one, other))
    return backed and bool(one == other)


def _shorten(ctx: Context, held: list[Node], chosen: BlockKeys, merged: BlockMerge | None) -> None:
    output, tokens, index = ctx.program.output, length_value(chosen.size), chosen.index
    gather = tokred.gather_keys.default if chosen.owners is None else tokred.gather_pairs.default
    if not held:
        raise EditError(
            "a block hands back no keys and values that could be shortened",
            where=[place(index)],
            remedy="load the model with a DynamicCache",
        )
    for node in held:
        shape = node.meta["val"].shape
        if len(shape) != 4 or not (same(size_of(shape[2]), size_of(tokens)) or _guarded(shape[2], tokens)):
            raise EditError(
                "the cache that this block hands back is not all of its keys and values",
                where=[place(node)],
                found=f"{tuple(shape)}, of {tokens} tokens",
                remedy="load the model with a DynamicCache",
            )
        with ctx.editor.after([node, index, *(merged.sources if merged else [])]):
            short = (
                ctx.editor.call(gather, node, index) if merged is None else merged.shortened(ctx.editor, node, index)
            )
        ctx.editor.swap_input(output, node, short)
