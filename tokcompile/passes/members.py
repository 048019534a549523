"""place, by slots: a merged token has several positions, each with a share of the frequencies."""

from __future__ import annotations

from collections import Counter

import torch
from torch.fx import Node

from tokcompile.axes import product, resolve
from tokcompile.errors import EditError, RuleError
from tokcompile.passes.context import Context
from tokcompile.passes.density_peaks import Members
from tokcompile.passes.variable import visual
from tokcompile.program import place as node_place
from tokcompile.rope.tables import Tables, angles_of, coordinates_of, inverse_of
from tokcompile.sites.turns import Frequencies, Turn
from tokcompile.steps import Place

aten = torch.ops.aten
tokred = torch.ops.tokred
_PICKS = {aten.index.Tensor, aten.index_select.default, aten.gather.default}


def place_slots(ctx: Context, step: Place, found: list[Frequencies], record: dict[str, object]) -> None:
    """Turn slot k's share of the frequencies by the position of member k: PPE (2025), section 3.2.

    Raises:
        RuleError: the slots do not divide the frequencies of every coordinate, or the merge lists fewer members.
        EditError: no layer holds the tokens of the merge, or they are not known any more.
    """
    if ctx.sites.phase != "prefill":
        record["note"] = "tokens of text have one position: no edit"
        return
    if step.of not in ctx.values:
        record["note"] = "the merge left all tokens as they were: no edit"
        return
    merged: Members = ctx.values[step.of]
    done = 0
    for each in found:
        turns = [turn for turn in each.turns if turn.via]
        if not turns:
            continue
        done += len(turns)
        axes, slots = shares(step, turns[0], each.pairs)
        source = turns[0].via[0]
        _check_first(ctx, turns, merged)
        with ctx.editor.before(turns[0].node):
            members = _members(ctx, step, each, merged, source)
            positions = ctx.editor.call(aten.transpose.int, coordinates_of(ctx.editor, each), 0, 1)
            ids = ctx.editor.call(tokred.slot_positions.default, positions, members, axes, slots)
            angles = angles_of(ctx.editor, ids, inverse_of(ctx.editor, each))
        Tables(ctx.editor, angles, passed=1).give(turns)
    if not done:
        raise EditError(
            "no layer holds the tokens of this merge",
            where=[step.at],
            found=f"merge '{step.of}'",
            remedy="merge before the stack, or at the input of one of its blocks",
        )


def _check_first(ctx: Context, turns: list[Turn], merged: Members) -> None:
    """The merge must be the first edit of the sequence: members are then the model's own tokens."""
    sources = {turn.via[0] for turn in turns}
    if len(sources) > 1 or ctx.sites.reach.above(next(iter(sources)), merged.node):
        raise EditError(
            "tokens that were merged had been cut before: their members are no longer the model's own tokens",
            where=[node_place(turns[0].node)],
            remedy="merge first, and drop after it",
        )


def _members(ctx: Context, step: Place, frequencies: Frequencies, merged: Members, source: Node) -> Node:
    """int64 [B, T', K], old tokens of the stack that each new one is made of; one of text repeats itself.

    Merged tokens stand among the text in their order, where images stood.
    """
    call, table, wanted = ctx.editor.call, merged.node, int(step.slots)
    if int(table.meta["val"].shape[2]) < wanted:
        raise RuleError(
            f"merge '{step.of}' lists fewer members than {wanted} slots",
            where=[step.at],
            found=f"slots: {table.meta['val'].shape[2]}",
            remedy="give the merge as many slots",
        )
    table = call(aten.slice.Tensor, table, 2, 0, wanted)
    if ctx.sites.splice is None:
        return table
    image = visual(ctx, frequencies)
    if not merged.text:
        _check_order(ctx, ctx.sites.splice.features)
        count = product(resolve(merged.axis))
        if not isinstance(count, int):
            raise EditError(
                "the number of image tokens is not known when the graph is compiled",
                where=[step.at],
                found=str(count),
                remedy="compile with a static image size",
            )
        places = call(tokred.kept_indices.default, image, count)
        flat = call(aten.gather.default, places, 1, call(aten.flatten.using_ints, table, 1, 2))
        table = call(aten.unflatten.int, flat, 1, [-1, wanted])
    here = call(aten.gather.default, image, 1, source)
    rank = call(aten.clamp.default, call(aten.sub.Tensor, call(aten.cumsum.default, here, 1), 1), 0)
    listed = call(tokred.gather_tokens.default, table, rank, 1, 0)
    here, alone = (call(aten.unsqueeze.default, value, 2) for value in (here, source))
    return call(aten.where.self, here, listed, alone)


def _check_order(ctx: Context, features: Node) -> None:
    """Refuse merged features that the model puts in another order before the text: members would be other tokens."""
    reach = ctx.sites.reach
    merges = [n for n in reach.order if n.target is tokred.mix_tokens.default and reach.above(n, features)]
    later = [n for n in reach.order if n.target in _PICKS and reach.above(n, features)]
    for node in later:
        if reach.any_above(node, merges):
            raise EditError(
                "features are put in another order after the merge",
                where=[node_place(node)],
                found="windows that are undone, or features that are picked from others",
                remedy="merge at decoder.0.input, where tokens stand as in the text",
            )


def shares(step: Place, turn: Turn, pairs: int) -> tuple[list[int], list[int]]:
    """For each frequency its coordinate and its slot: within a coordinate, slot by slot from the highest on.

    Raises:
        RuleError: the slots do not divide the frequencies of every coordinate.
    """
    axes = dict(zip(turn.pairs, turn.coordinates, strict=True))
    counts = Counter(axes[pair] for pair in range(pairs))
    if any(count % step.slots for count in counts.values()):
        raise RuleError(
            f"{step.slots} slots do not divide the frequencies of every coordinate",
            where=[step.at],
            found=f"{', '.join(str(counts[a]) for a in sorted(counts))} frequencies",
            remedy="use a divisor of all of these",
        )
    seen: Counter[int] = Counter()
    slots = []
    for pair in range(pairs):
        axis = axes[pair]
        slots.append(seen[axis] * step.slots // counts[axis])
        seen[axis] += 1
    return [axes[pair] for pair in range(pairs)], slots
