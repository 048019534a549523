"""Let attention of a grid of patches run on super tokens, and give each patch back its share of the results."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from tokcompile.axes import product, resolve
from tokcompile.editing.tokenmap import map_of
from tokcompile.editing.transport import Transport
from tokcompile.editing.within import apply_within
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, longest_segment
from tokcompile.program import place as node_place
from tokcompile.sites import Place
from tokcompile.sites.address import resolve_every
from tokcompile.sites.concrete import evaluate
from tokcompile.sites.features import Sequence, sequence
from tokcompile.sites.grid import patch_grid
from tokcompile.sites.projection import projected, projection_input
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True)
class Patches:
    """The patches of a sequence, and the grid and cells that they stand in.

    Attributes:
        start, end: where they begin and end among class and register tokens.
        grid: height and width of the grid, and of a cell, in patches.
    """

    start: int
    end: int
    grid: tuple[int, int, int, int]

    @property
    def cells(self) -> int:
        """How many super tokens there are."""
        height, width, high, wide = self.grid
        return -(-height // high) * -(-width // wide)


def attend_to_super_tokens(ctx: Context, step: Merge) -> None:
    """Wrap the attention of every block that the step names; a cell of one patch leaves the graph as it is."""
    places = resolve_every(ctx.sites, step.at)
    count = len(places) if step.blocks is None else int(step.blocks)
    for number in range(min(count, len(places))):
        _wrap(ctx, step, resolve_every(ctx.sites, step.at)[number])


def _wrap(ctx: Context, step: Merge, place: Place) -> None:
    block = ctx.sites.stacks[place.owner].blocks[place.block]
    _check_positions(ctx, place)
    before = projection_input(block)
    after = projected(block, ctx.sites.reach)
    at = sequence(ctx.program, ctx.sites, before)
    if at is None or at.packed or before.meta["val"].ndim != 3:
        raise EditError(
            "super tokens are made of a value [B, T, C]",
            where=[node_place(before)],
            found=f"{tuple(before.meta['val'].shape)}",
        )
    patches = _patches(ctx, step, place, at)
    total, others = product(resolve(at.axis)), patches.start - patches.end
    record = {"verb": "merge", "at": place.address, "by": step.by, "from": str(total)}
    ctx.log.append(record)
    if patches.grid[2:] == (1, 1):
        record["note"] = "cells of one patch: no edit"
        return
    new = total + others + patches.cells
    record["to"] = str(new)
    editor, call = ctx.editor, ctx.editor.call
    with editor.after([before]):
        inside = call(aten.slice.Tensor, before, 1, patches.start, patches.end)
        options = (int(step.iterations), bool(step.mask_ghosts))
        affinity = call(tokred.super_token_affinity.default, inside, *patches.grid, *options)
        pooled = call(tokred.super_token_pool.default, inside, affinity, *patches.grid)
        content = _joined(ctx, before, patches, pooled, patches.end, total)
        like = call(aten.select.int, before, -1, 0)
        token_map = map_of(editor, _index(ctx, before, patches, total), like, at, total, new, "keep")
    apply_within(Transport(editor, ctx.sites), before, after, token_map, content)
    with editor.after([after]):
        spread = call(aten.slice.Tensor, after, 1, patches.start, patches.start + patches.cells)
        spread = call(tokred.super_token_spread.default, spread, affinity, *patches.grid)
        restored = _joined(ctx, after, patches, spread, patches.start + patches.cells, new)
    for user in [u for u in after.users if u not in editor.made]:
        editor.swap_input(user, after, restored)
    ctx.refresh()


def _check_positions(ctx: Context, place: Place) -> None:
    """Refuse an attention whose scores depend on where tokens stand: super tokens stand between places."""
    site = place.attention
    rotary = bool(ctx.sites.rotary.get(place.owner))
    masked = site.mask is not None and not _hides_nothing(ctx, site.mask)
    if rotary or masked or site.padding is not None or site.is_causal:
        raise EditError(
            "super tokens have no place in this attention",
            where=[node_place(site.node)],
            found="rotary positions" if rotary else "a mask, or a bias by places",
            remedy="wrap an attention without mask and without positions: those of a ViT, CLIP or SigLIP tower",
        )


def _hides_nothing(ctx: Context, mask: Node) -> bool:
    """Whether a mask is a constant that lets every query see every key, and adds nothing: some models make one."""
    reach = ctx.sites.reach
    if not all(node.op == "call_function" or _is_zero(ctx, node) for node in reach.ancestors([mask])):
        return False
    value = evaluate(mask, reach)  # which takes constants for 0
    return value is not None and bool((value if value.dtype == torch.bool else value == 0).all())


def _is_zero(ctx: Context, node: Node) -> bool:
    held = getattr(ctx.program.gm, str(node.target), None) if node.op == "get_attr" else None
    known = isinstance(held, torch.Tensor) and not isinstance(held, FakeTensor) and held.dtype.is_floating_point
    return known and held.device.type == "cpu" and bool((held == 0).all())


def _patches(ctx: Context, step: Merge, place: Place, at: Sequence) -> Patches:
    axis = resolve(at.axis)
    inner = longest_segment(axis) if len(axis) == 1 and axis[0].segments else axis
    grid = patch_grid(ctx.program, inner)
    if grid is None:
        raise EditError(
            "super tokens need the patch grid",
            where=[place.address],
            found=f"a sequence of {product(axis)} tokens without one",
            remedy="wrap attention of a vision stack, before tokens are dropped",
        )
    start, end = ctx.segment_bounds(axis, inner) if inner != axis else (0, product(axis))
    high, wide = step.cell if isinstance(step.cell, tuple) else (step.cell, step.cell)
    return Patches(start, end, (*grid, int(high), int(wide)))


def _joined(ctx: Context, whole: Node, patches: Patches, middle: Node, rest: int, total: int) -> Node:
    """Class tokens of a value in front of its middle part, and those from `rest` on behind it."""
    parts = [middle]
    if patches.start:
        parts.insert(0, ctx.editor.call(aten.slice.Tensor, whole, 1, 0, patches.start))
    if rest < total:
        parts.append(ctx.editor.call(aten.slice.Tensor, whole, 1, rest, total))
    return ctx.editor.call(aten.cat.default, parts, 1) if len(parts) > 1 else middle


def _index(ctx: Context, like: Node, patches: Patches, total: int) -> Node:
    """int64 [B, T']: class tokens themselves, and for each super token the first patch of its cell."""
    call, device = ctx.editor.call, like.meta["val"].device
    height, width, high, wide = patches.grid
    rows = call(aten.arange.start_step, 0, height * width, high * width, device=device)
    columns = call(aten.arange.start_step, 0, width, wide, device=device)
    corners = call(aten.add.Tensor, call(aten.unsqueeze.default, rows, 1), columns)
    corners = call(aten.add.Tensor, call(aten.flatten.using_ints, corners, 0, 1), patches.start)
    parts = [corners]
    if patches.start:
        parts.insert(0, call(aten.arange.default, patches.start, device=device))
    if patches.end < total:
        parts.append(call(aten.arange.start, patches.end, total, device=device))
    index = call(aten.cat.default, parts, 0) if len(parts) > 1 else corners
    return call(aten.expand.default, call(aten.unsqueeze.default, index, 0), [ctx.editor.size(like, 0), -1])
