"""place, by slots: a merged token has several positions, each with a share of the frequencies."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.errors import EditError, RuleError
from tokcompile.passes.context import Context
from tokcompile.program import place as node_place
from tokcompile.sites.turns import Frequencies, Turn
from tokcompile.steps import Place
from tokcompile.tables import Tables, angles_of, coordinates_of, inverse_of

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class Members:
    """What the tokens of a merge are made of.

    Attributes:
        table: int64 [B, T', K or more], old tokens, the nearest to a token's centre first and repeated in turn where
            there are fewer; a token that was not merged repeats itself.
        source: int64 [B, T'], the old token that each new one stands for, of the merge's token map.
    """

    table: Node
    source: Node


def place_slots(ctx: Context, step: Place, found: list[Frequencies], record: dict[str, object]) -> None:
    """Turn slot k's share of the frequencies by the position of member k: PPE (2025), section 3.2.

    Raises:
        RuleError: the slots do not divide the frequencies of every coordinate.
        EditError: no layer holds the tokens of the merge.
    """
    if ctx.sites.phase != "prefill":
        record["note"] = "tokens of text have one position: no edit"
        return
    members: Members = ctx.values[step.of]
    done = 0
    for each in found:
        turns = [turn for turn in each.turns if turn.via and turn.via[-1] is members.source]
        if not turns:
            continue
        done += len(turns)
        axes, slots = shares(step, turns[0], each.pairs)
        if len(turns[0].via) > 1:
            raise EditError(
                "tokens that were merged had been cut before: their members are no longer the model's own tokens",
                where=[node_place(turns[0].node)],
                remedy="merge first, and drop after it",
            )
        with ctx.editor.before(turns[0].node):
            positions = ctx.editor.call(aten.transpose.int, coordinates_of(ctx.editor, each), 0, 1)
            ids = ctx.editor.call(tokred.slot_positions.default, positions, members.table, axes, slots)
            angles = angles_of(ctx.editor, ids, inverse_of(ctx.editor, each))
        Tables(ctx.editor, angles, gathered=False).give(turns)
    if not done:
        raise EditError(
            "no layer holds the tokens of this merge",
            where=[step.at],
            found=f"merge '{step.of}'",
            remedy="merge at the input of the stack, or of one of its blocks, before placing",
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
