"""place, by variable: tokens of images advance by a fraction where tokens of text advance by 1."""

from __future__ import annotations

from functools import reduce

import torch
from torch.fx import Node

from tokcompile.axes import Dim, resolve
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.turned import keep_offset, offset, refuse_fractions
from tokcompile.rope.tables import Tables, angles_of, inverse_of, rows_of
from tokcompile.sites.turns import Frequencies
from tokcompile.steps import Place

aten = torch.ops.aten
tokred = torch.ops.tokred
_NAME = "units"


def place_variable(ctx: Context, step: Place, found: list[Frequencies], record: dict[str, object]) -> None:
    """Count positions in parts of 1, each image at a pace of its own: V2PE (Ge et al. 2024), section 3.2.

    Positions are integers, in units of 1 / denominator, until they meet the frequencies: no fraction is ever rounded to
    half precision. A later step goes on by 1 from the prompt's last position, which is kept beside the cache.
    """
    strides = [int(share * step.denominator) for share in step.delta]
    record["delta"] = ", ".join(map(str, step.delta))
    if all(stride == step.denominator for stride in strides):
        record["note"] = "all tokens advance by 1: no edit"
        return
    prefill = ctx.sites.phase == "prefill"
    starts = {_start(each.positions) for each in found}
    if len(starts) > 1 and ctx.program.carried is not None:
        raise EditError(
            "layers whose tokens are numbered apart cannot go on from a cache under positions in fractions",
            where=[step.at],
            found=f"{len(starts)} numberings, as a drop with `positions: compact` in the middle of the stack makes",
            remedy="use `positions: keep` in drops before it",
        )
    for each in found:
        refuse_fractions(ctx, each, step.at)
        with ctx.editor.before(each.turns[0].node):
            whole, inverse = rows_of(ctx.editor, each), inverse_of(ctx.editor, each)
            seen = visual(ctx, each) if prefill or ctx.sites.splice is not None else None
            units = _units(ctx, step, whole, seen, strides)
            usual = ctx.editor.call(aten.mul.Tensor, whole, step.denominator)
            if not prefill:
                units = ctx.editor.call(aten.sub.Tensor, units, offset(ctx, step.address.stack, _NAME))
            keep_offset(ctx, usual, units, _NAME)
            finer = ctx.editor.call(aten.div.Tensor, inverse, float(step.denominator))
            angles = angles_of(ctx.editor, units, finer)
        Tables(ctx.editor, angles).give(each.turns)


def _start(positions: Node) -> Node:
    """The positions that others are views of."""
    while positions.target in (aten.unsqueeze.default, aten.expand.default, aten.to.dtype):
        positions = positions.args[0]
    return positions


def _units(ctx: Context, step: Place, whole: Node, seen: Node | None, strides: list[int]) -> Node:
    if seen is None:
        return ctx.editor.call(aten.mul.Tensor, whole, step.denominator)
    return ctx.editor.call(tokred.variable_positions.default, whole, seen, strides, step.denominator)


def visual(ctx: Context, frequencies: Frequencies) -> Node:
    """bool [B, T] on the axis of the positions: where features of images stand, dropped ones among them."""
    goal = ctx.program.axes.of(frequencies.positions)[frequencies.tokens]
    if ctx.sites.splice is None:
        return ctx.image_mask(goal)  # says that there are no images
    masks = [_on_axis(ctx, each.mask, goal) for each in ctx.sites.splice.all]
    return reduce(lambda one, other: ctx.editor.call(aten.logical_or.default, one, other), masks)


def _on_axis(ctx: Context, mask: Node, goal: Dim) -> Node:
    """A mask [B, T, 1 or C] of a splice as [B, T] on an axis that its own was cut from, or that was cut from it."""
    axes, goal = ctx.program.axes, resolve(goal)
    older = mask
    while older.all_input_nodes and len(axes.of(older)) > 1 and axes.of(older)[1] != goal:
        older = older.all_input_nodes[0]
    if older is not mask and len(axes.of(older)) > 1 and axes.of(older)[1] == goal:
        mask = older
    own = axes.of(mask)[1]
    flat = mask if mask.meta["val"].ndim == 2 else ctx.editor.call(aten.select.int, mask, -1, 0)
    return ctx.align(flat, own, goal)
