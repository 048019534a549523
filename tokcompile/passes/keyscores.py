"""score, at caches: give each key of each cached head a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim
from tokcompile.errors import EditError, RuleError
from tokcompile.passes.context import Context
from tokcompile.passes.keystate import (
    KeyState,
    attention_here,
    evicts_later,
    in_later_step,
    seen_keys,
    told_of_keys,
)
from tokcompile.program import place as node_place
from tokcompile.sites import Attention, Block, resolve_blocks, resolve_caches, window_of
from tokcompile.sites.cache import SHORTENED, Cache, handed_back, is_left_out, unturned
from tokcompile.steps import Score

if TYPE_CHECKING:
    from tokcompile.passes.insertplaces import Slots

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class BlockScores:
    """Scores of one block's cache.

    Attributes:
        node: float32 [B, H, T], a large one means keep.
        axis: the tokens that they are of.
        block, cache: where they are of: the number of the block, and its cache.
        valid: bool [B, T], which of them are real; None: all are.
        state: what later steps are told of the keys that stay, if these evict too.
    """

    node: Node
    axis: Dim
    block: int
    cache: Cache
    valid: Node | None
    state: KeyState


@dataclass(frozen=True, eq=False)
class KeyScores:
    """Scores of the caches of blocks.

    Attributes:
        blocks: by number of the block.
        windowed: numbers of blocks that attend in a window: their caches are bounded as it is, and stay.
        amounts: whether the scores are amounts of something, none below 0.
    """

    blocks: dict[int, BlockScores]
    windowed: tuple[int, ...]
    amounts: bool


def score_keys(ctx: Context, step: Score) -> None:
    """Insert the scores of every cache that an address names.

    Queries and keys are those of the attention itself, after whatever norms, rotations and scales the model has.
    """
    made, windowed = {}, []
    for index, block, cache in resolve_caches(ctx.sites, step.at):
        if unturned(cache.key).target in SHORTENED:
            raise EditError(
                "keys of this cache were evicted before",
                where=[f"decoder.{index}.cache"],
                remedy="let one rule evict, to the smaller budget",
            )
        if window_of(block.attention, ctx.sites.reach) is not None:
            windowed.append(index)
            continue
        made[index] = _scored(ctx, step, index, block, cache)
    windowed = sorted({*windowed, *_bounded(ctx, step)})
    if windowed and not made:
        raise EditError(
            "no cache can be shortened: every block attends in a window, which bounds its cache as it is",
            where=[step.at],
            found=f"windows in blocks {', '.join(map(str, windowed))}",
            remedy="use the rule on a model whose attention sees all keys",
        )
    ctx.values[step.name] = KeyScores(made, tuple(windowed), _amounts(ctx, step))
    record: dict[str, Any] = {"verb": "score", "name": step.name, "by": step.by, "at": step.at, "blocks": len(made)}
    if windowed:
        record["windows"] = windowed
    if not made:
        record["note"] = "this call keeps no keys and values: there is nothing to score or to evict"
    ctx.log.append(record)


def _amounts(ctx: Context, step: Score) -> bool:
    """Whether no score of a step is below 0."""
    if step.by == "joined":
        return step.largest is True and all(ctx.values[name].amounts for name in step.scores)
    return step.largest is True and step.by in ("attention_received", "norm", "random", "recency")


def _bounded(ctx: Context, step: Score) -> list[int]:
    """Blocks that hand back the keys of their window alone, of a prompt that is longer.

    Raises:
        EditError: a block without a window hands back a part of its keys.
    """
    outputs, found = ctx.program.output.all_input_nodes, []
    for index, block in resolve_blocks(ctx.sites, step.at):
        part = [] if block in ctx.sites.caches else handed_back(block, ctx.sites.reach, outputs)
        if part and window_of(block.attention, ctx.sites.reach) is None:
            raise EditError(
                "the cache that this block hands back is not all of its keys and values",
                where=[f"decoder.{index}.cache"],
                found=str(tuple(part[0].meta["val"].shape)),
                remedy="load the model with a DynamicCache",
            )
        found += [index] if part else []
    return found


def _scored(ctx: Context, step: Score, index: int, block: Block, cache: Cache) -> BlockScores:
    site, axes, call = block.attention, ctx.program.axes, ctx.editor.call
    axis = axes.of(cache.key)[2]
    parts = [ctx.values[name].blocks[index].node for name in step.scores]
    parts += [slots.fresh for slots in (ctx.values.get(step.voters),) if slots is not None and slots.fresh is not None]
    with ctx.editor.after([site.node, cache.key, *parts, *ctx.sites.paddings.values()]):
        later, state = in_later_step(ctx), KeyState()
        valid = seen_keys(ctx, block, cache) if later else ctx.valid_mask(axis)
        if step.by == "attention_received":
            node, state = _received(ctx, step, index, block, cache, valid)
        elif step.by == "norm":
            node = call(aten.linalg_vector_norm.default, cache.key, float(step.p), [-1], dtype=torch.float32)
        elif step.by == "cosine":
            node = call(tokred.key_cosine.default, cache.key, valid)
        elif step.by == "random" and (later or evicts_later(ctx, step.name)):
            raise EditError(
                "random scores of keys are drawn once, for those of the prompt",
                found="an eviction at later steps",
                remedy="when: prefill, or score by something else",
            )
        elif step.by == "random":
            node = call(tokred.random_keys.default, cache.key, valid, int(step.seed) + (index << 32))
        elif step.by == "recency":
            node = _recency(ctx, cache, valid)
        elif step.by == "joined":
            how = (int(step.recent), step.align == "mean", step.join)
            node = call(tokred.join_key_scores.default, parts, valid, *how)
        else:
            raise RuleError(
                f"keys of a cache cannot be scored by '{step.by}'",
                remedy="attention_received, norm, cosine, random, recency or joined",
            )
        if not step.largest:
            node = call(aten.neg.default, node)
    node.meta["scores"] = step.name
    return BlockScores(node, axis, index, cache, valid, state)


def _received(
    ctx: Context, step: Score, index: int, block: Block, cache: Cache, valid: Node | None
) -> tuple[Node, KeyState]:
    """Attention that each key gets from the queries that count, and what of it is added up over steps."""
    site, call = block.attention, ctx.editor.call
    if site.partial:
        raise EditError(
            "attention received cannot be counted where the model adds several masks to its scores",
            where=[node_place(site.node)],
            remedy="score by something else, or load the model with fused attention",
        )
    key = call(aten.transpose.int, site.key, -2, -1) if site.key_transposed else site.key
    rows, window = _voting(ctx, step, site, cache, valid)
    (mask, is_causal), sinks = attention_here(ctx, block, cache), ctx.attention_sinks(site)
    adds_up = step.accumulate and evicts_later(ctx, step.name)
    reduce, state = "sum" if adds_up else step.reduce, KeyState()
    heads = 1 if step.shared else cache.key.meta["val"].shape[1]
    how = (site.scale, is_causal, site.softcap, step.heads, reduce, *sinks)
    node = call(tokred.key_attention.default, site.query, key, mask, rows, window, heads, *how)
    if is_left_out(cache.key):
        node = call(tokred.gather_tokens.default, node, cache.key.args[1], 2, 0)
    if step.shared:
        node = call(aten.expand.default, node, [ctx.editor.size(cache.key, dim) for dim in range(3)])
    if adds_up and is_left_out(cache.key):
        raise EditError(
            "attention cannot be added up over steps where tokens were put into the prompt that caches do not hold",
            remedy="accumulate: false, or evict after the prompt alone",
        )
    if adds_up:
        seen = None
        if step.reduce == "seen":
            seen = call(tokred.key_viewers.default, site.query, key, mask, rows, window, is_causal)
        node, state = _added_up(ctx, step, index, cache, node, seen)
    if int(step.smooth) == 1:
        return node, state
    own = 0 if step.voters else window
    return call(tokred.smooth_keys.default, node, valid, own, int(step.smooth), step.pool), state


def _voting(ctx: Context, step: Score, site: Attention, cache: Cache, valid: Node | None) -> tuple[Node | None, int]:
    """Which queries may count, bool [B, Tq] or None for all, and how many of the last of them do, 0 for all."""
    axis = ctx.program.axes.of(site.query)[-2]
    if step.voters:
        return _inserted(ctx, step, axis)
    window = {"all": 0, "last": 1}.get(step.queries)
    window = int(step.queries.removeprefix("last:")) if window is None else window
    if not is_left_out(cache.key):
        return None if in_later_step(ctx) else valid, window
    if valid is None:
        valid = ctx.editor.call(aten.select.int, ctx.editor.call(aten.select.int, cache.key, 3, 0), 1, 0)
        valid = ctx.editor.call(aten.ones_like.default, valid, dtype=torch.bool)
    return ctx.align(valid, ctx.program.axes.of(cache.key)[2], axis), window


def _inserted(ctx: Context, step: Score, axis: Dim) -> tuple[Node, int]:
    """The queries of the tokens that a step put in."""
    slots: Slots = ctx.values[step.voters]
    if slots.fresh is None:
        raise EditError(
            f"'{step.voters}' inserts no tokens, and so none can vote", where=[step.at], remedy="a count of at least 1"
        )
    own = ctx.program.axes.of(slots.fresh)[1]
    if not ctx.leads(own, axis):
        raise EditError(
            f"the tokens of '{step.voters}' are not there where keys are scored",
            where=[step.at],
            remedy="insert in front of the blocks whose caches are scored, until: head.input",
        )
    return ctx.align(slots.fresh, own, axis), slots.count if isinstance(slots.count, int) else 0


def _added_up(
    ctx: Context, step: Score, index: int, cache: Cache, now: Node, seen: Node | None
) -> tuple[Node, KeyState]:
    """Scores of keys from all queries so far, and the sums that they are made of.

    Args:
        now: the attention of this graph's queries, float32 [B, H, T].
        seen: how many of these see each key, float32 [B, T], for a mean over those.
    """
    if step.heads == "max":
        raise EditError(
            "the largest of several heads cannot be added up over steps",
            found="heads: max",
            remedy="heads: mean, or accumulate: false",
        )
    call, later = ctx.editor.call, in_later_step(ctx)
    of_keys = {"attention": now}
    if seen is not None:
        sizes = [ctx.editor.size(cache.key, dim) for dim in range(3)]
        of_keys["queries"] = call(aten.expand.default, call(aten.unsqueeze.default, seen, 1), sizes)
    if later:
        for name, value in list(of_keys.items()):
            of_keys[name] = call(aten.add.Tensor, told_of_keys(ctx, index, cache, name), value)
    score = of_keys["attention"]
    if seen is not None:
        score = call(aten.div.Tensor, score, call(aten.clamp_min.default, of_keys["queries"], 1))
    return score, KeyState(of_keys)


def _recency(ctx: Context, cache: Cache, valid: Node | None) -> Node:
    """Which real token of its row each key is of, as a score."""
    call, key = ctx.editor.call, cache.key
    rows, heads, tokens = (ctx.editor.size(key, dim) for dim in range(3))
    if valid is None:
        order = call(aten.arange.default, tokens, dtype=torch.float32, device=key.meta["val"].device)
        order = call(aten.view.default, order, [1, 1, tokens])
    else:
        order = call(aten.to.dtype, call(aten.cumsum.default, valid, 1), torch.float32)
        order = call(aten.unsqueeze.default, order, 1)
    return call(aten.expand.default, order, [rows, heads, tokens])
