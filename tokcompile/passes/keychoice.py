"""select, of scores of caches: choose the keys of each cached head that stay."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import resolve
from tokcompile.budget import clamp
from tokcompile.decoding.carried import evicted_name, padding_name
from tokcompile.editing.edit import Length, length_value, sub
from tokcompile.errors import EditError, RuleError
from tokcompile.passes.context import Context, oldest
from tokcompile.passes.imagetokens import image_tokens
from tokcompile.passes.jointheads import choose_pairs, shares_budget
from tokcompile.passes.keyscores import BlockScores, KeyScores
from tokcompile.passes.keystate import KeyState, in_later_step, told_of_rows
from tokcompile.steps import Select

tokred = torch.ops.tokred
aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class BlockKeys:
    """The keys of one block's cache that stay: int64 [B, H, k] ascending; None where all T do.

    Attributes:
        owners: int64 [B, H, k], of which heads they are, where heads share a budget: `index` then is of pairs, head * T
            + token.
        valid, among: bool [B, T], real tokens and those that were up for choice; None: all.
        padding, evicted: int64 [B], how many of them are padding, and how many others there were, where a later step
            cannot tell from its mask: where tokens were dropped before.
        state: what later steps that evict too are told of the keys.
    """

    index: Node | None
    size: Length
    count: Length
    valid: Node | None = None
    among: Node | None = None
    padding: Node | None = None
    evicted: Node | None = None
    state: KeyState = KeyState()
    owners: Node | None = None


@dataclass(frozen=True, eq=False)
class KeySelection:
    """The keys that stay, by number of the block; `windowed` blocks keep what their window does.

    Attributes:
        first, last: how many real tokens at either end of a row stay in any case.
    """

    blocks: dict[int, BlockKeys]
    windowed: tuple[int, ...]
    first: int
    last: int


def choose_keys(ctx: Context, step: Select) -> None:
    """Insert a choice for every cache that was scored."""
    scores: KeyScores = ctx.values[step.scores]
    budgets = _budgets(ctx, step, scores)
    made = {index: _chosen(ctx, step, each, budgets[index]) for index, each in scores.blocks.items()}
    ctx.values[step.name] = KeySelection(made, scores.windowed, int(step.sinks), int(step.recent))
    counts = [str(length_value(each.count)) for each in made.values()]
    record: dict[str, Any] = {"verb": "select", "name": step.name, "by": step.by, "counts": counts}
    ctx.log.append(record)


def _chosen(ctx: Context, step: Select, scores: BlockScores, budget: Length) -> BlockKeys:
    node, axis = scores.node, scores.axis
    sized = [budget] if isinstance(budget, Node) else []
    with ctx.editor.after([node, *sized, *ctx.mask_sources(step.among)]):
        total = ctx.editor.size(node, 2)
        among, count = None, budget
        if step.among != "all":
            image = ctx.image_mask(axis)
            images = image_tokens(ctx, axis, total, "row")
            among = image if step.among == "image" else ctx.editor.call(aten.logical_not.default, image)
            others = images if step.among == "text" else ctx.editor.arithmetic(sub, total, images)
            count = ctx.editor.arithmetic(lambda some, rest: some + rest, budget, others)
        valid, state = scores.valid, scores.state
        if in_later_step(ctx):
            padding, evicted = _told_again(ctx, scores, total, count)
        else:
            padding, evicted = _told(ctx, node, valid, total, count) if _shortened(ctx) else (None, None)
        index, owners = None, None
        ends, turn = (int(step.sinks), int(step.recent)), None
        if step.by == "pairwise":
            turn, state = _turns(ctx, scores, total, count)
        if step.heads == "joint" and shares_budget(ctx.sites, scores.block):
            stay = None if _same(total, count) else (*ends, count)
            index, owners = choose_pairs(ctx, step, node, valid, among, stay)
        elif turn is not None and not _same(total, count):
            most = _most(ctx, scores, total, count)
            index = ctx.editor.call(tokred.pairwise_keys.default, node, valid, turn, *ends, count, most)
        elif not _same(total, count):
            index = ctx.editor.call(tokred.keep_keys.default, node, valid, among, *ends, count)
    return BlockKeys(index, total, count, valid, among, padding, evicted, state, owners)


def _turns(ctx: Context, scores: BlockScores, total: Length, count: Length) -> tuple[Node, KeyState]:
    """int64 [B]: how many keys of each row were evicted before by turns, and what later steps are told of it."""
    call, valid = ctx.editor.call, scores.valid
    rows, device = ctx.editor.size(scores.node, 0), scores.node.meta["val"].device
    if valid is None:
        real = call(aten.full.default, [rows], total, dtype=torch.int64, device=device)
    else:
        real = call(aten.sum.dim_IntList, valid, [1])
    gone = call(aten.clamp_min.default, call(aten.sub.Tensor, real, count), 0)
    if not in_later_step(ctx):
        return call(aten.zeros_like.default, gone), scores.state.with_rows(turn=gone)
    before = told_of_rows(ctx, scores.block, scores.cache, "turn")
    return before, scores.state.with_rows(turn=call(aten.add.Tensor, before, gone))


def _most(ctx: Context, scores: BlockScores, total: Length, count: Length) -> int:
    """How many keys a head may lose here."""
    most = length_value(total) - length_value(count)
    if in_later_step(ctx):
        most = ctx.sites.stacks["decoder"].blocks[scores.block].attention.query.meta["val"].shape[-2]
    if isinstance(most, int):
        return most
    raise EditError(
        "pairs are compared one after the other, of a number of keys that is known when the graph is compiled",
        found=str(most),
        remedy="compile with dynamic=False, or choose by: topk",
    )


def _same(one: Length, other: Length) -> bool:
    return isinstance(length_value(one), int) and length_value(one) == length_value(other)


def _shortened(ctx: Context) -> bool:
    """Whether earlier steps changed how many tokens the caches hold, or some of them."""
    axes = [ctx.program.axes.of(cache.key)[2] for cache in ctx.sites.caches.values()]
    return any(oldest(axis) != resolve(axis) for axis in axes)


def _told(ctx: Context, scores: Node, valid: Node | None, total: Length, count: Length) -> tuple[Node | None, Node]:
    """What later steps are told of a cache, int64 [B]: the padding that it holds, and how many keys it lost."""
    call, rows = ctx.editor.call, ctx.editor.size(scores, 0)
    device = scores.meta["val"].device
    gone = ctx.editor.arithmetic(sub, total, count)
    evicted = call(aten.full.default, [rows], gone, dtype=torch.int64, device=device)
    if valid is None:
        return None, evicted
    real = call(aten.sum.dim_IntList, valid, [1])
    spare = call(aten.sub.Tensor, call(aten.full_like.default, real, count), real)
    return call(aten.clamp_min.default, spare, 0), evicted


def _told_again(ctx: Context, scores: BlockScores, total: Length, count: Length) -> tuple[Node | None, Node | None]:
    """What a later step has been told of a cache, brought up to date; None for what it did not ask for."""
    call, taken, gone = ctx.editor.call, ctx.program.taken, ctx.editor.arithmetic(sub, total, count)
    padding, evicted = taken.get(padding_name(scores.block)), taken.get(evicted_name(scores.block))
    if padding is not None:
        padding = call(aten.clamp_min.default, call(aten.sub.Tensor, padding, gone), 0)
    return padding, None if evicted is None else call(aten.add.Tensor, evicted, gone)


def _budgets(ctx: Context, step: Select, scores: KeyScores) -> dict[int, Length]:
    """How many of the keys up for choice stay in each block."""
    found: dict[int, Length] = {}
    for index, each in scores.blocks.items():
        with ctx.editor.after([each.node, *ctx.mask_sources(step.among)]):
            size = ctx.editor.size(each.node, 2)
            if step.among != "all":
                images = image_tokens(ctx, each.axis, size, "row")
                size = images if step.among == "image" else ctx.editor.arithmetic(sub, size, images)
            if in_later_step(ctx) and ctx.instance.is_share(step):
                found[index] = ctx.editor.size(each.cache.past, 2)  # a share was one of the prompt's tokens
            else:
                found[index] = ctx.editor.arithmetic(lambda n: ctx.instance.budget(step, n), size)
            _check_ends(ctx, step, found[index], size)
    taper = int(step.taper)
    if taper < 1:
        raise RuleError("'taper' is less than 1", found=str(taper), remedy="1 for equal budgets, or more")
    return found if taper == 1 or len(found) < 2 else _tapered(ctx, step, scores, found, taper)


def _check_ends(ctx: Context, step: Select, budget: Length, size: Length) -> None:
    """Refuse a budget that has no room for the tokens that are chosen in any case."""
    ends, count, total = int(step.sinks) + int(step.recent), length_value(budget), length_value(size)
    if isinstance(count, int) and count < ends and not (isinstance(total, int) and total <= count):
        raise EditError(
            "the budget has no room for the tokens that stay in any case",
            found=f"{count} tokens, of which {step.sinks} sinks and {step.recent} recent ones stay",
            remedy="a larger budget, or fewer sinks and recent tokens",
        )


def _tapered(
    ctx: Context, step: Select, scores: KeyScores, budgets: dict[int, Length], taper: int
) -> dict[int, Length]:
    """Budgets that fall evenly from the first block to the last and have the same sum.

    PyramidKV (Cai et al. 2024), section 4: the last block has 1/taper of the mean, without the recent tokens and sinks
    that every block keeps. Sums are exact: what rounding loses goes to the blocks that it took most from.
    """
    ends, values = int(step.sinks) + int(step.recent), [length_value(b) for b in budgets.values()]
    base = values[0]
    if not all(isinstance(value, int) and value == base for value in values):
        raise EditError(
            "budgets taper over blocks whose caches hold equally many tokens, known when the graph is compiled",
            found=", ".join(map(str, values)),
            remedy="give the budget as a count that no prompt is shorter than, or taper: 1",
        )
    first = next(iter(scores.blocks.values())).node
    size = first.meta["val"].shape[2]
    shares = tapered(base - ends, taper, len(budgets), size - ends if isinstance(size, int) else None)
    out: dict[int, Length] = {}
    for index, share in zip(budgets, shares, strict=True):
        node = scores.blocks[index].node
        with ctx.editor.after([node]):
            total = ctx.editor.size(node, 2)
            out[index] = ctx.editor.arithmetic(lambda n, k=share + ends: clamp(k, n), total)
    return out


def tapered(base: int, taper: int, blocks: int, most: int | None) -> list[int]:
    """Counts that fall evenly and sum to base * blocks.

    Args:
        base: the mean.
        taper: the last is base / taper.
        most: what none exceeds; the fall is then less steep. None: nothing.
    """
    low = Fraction(base, taper)
    high = 2 * base - low
    if most is not None and high > most:
        high = Fraction(max(most, base))
        low = 2 * base - high
    ideal = [high - index * (high - low) / (blocks - 1) for index in range(blocks)]
    counts = [int(value) for value in ideal]
    missing = base * blocks - sum(counts)
    for index in sorted(range(blocks), key=lambda i: (counts[i] - ideal[i], i))[:missing]:
        counts[index] += 1
    return counts
