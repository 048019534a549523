"""select and evict, `heads: joint`: all heads of a block choose their keys together, and some keep more than others.

The sum over the heads is fixed, so a cache stays one tensor [B, H, k, D]: its slots, read row by row, hold the keys of
the first head, then those of the next. Which head a slot belongs to is handed on beside it, and a later step attends
with each head to the slots that are its own. What a step appends to row h is head h's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.binding import RuleInstance
from tokcompile.decoding.carried import hand_on, owners_name, take
from tokcompile.editing.edit import Length
from tokcompile.errors import EditError
from tokcompile.expr import substitute
from tokcompile.passes.context import Context
from tokcompile.passes.route import fixed, mask_of
from tokcompile.program import place
from tokcompile.rulefile import Rule
from tokcompile.sites import Block, Sites, resolve_caches, window_of
from tokcompile.sites.attention import Attention
from tokcompile.sites.cache import Cache, is_left_out, unrepeated
from tokcompile.steps import Evict, Mark, Select

aten = torch.ops.aten
tokred = torch.ops.tokred


def is_joint(rule: Rule, step: Evict, known: Mapping[str, object]) -> bool:
    """Whether an eviction keeps what all heads chose together."""
    choice = next(s for s in rule.steps if isinstance(s, Select) and s.name == step.keep)
    return substitute(choice.heads, known) == "joint"


def shares_budget(sites: Sites, index: int) -> bool:
    """Whether a block's cache has several heads, that can keep different numbers of keys."""
    cache = sites.caches[sites.stacks["decoder"].blocks[index]]
    return cache.key.meta["val"].shape[1] > 1


def check_joints(rules: Sequence[RuleInstance]) -> None:
    """Refuse rules of which one leaves empty slots in a cache whose slots another gives to any head.

    Raises:
        EditError: it names both steps.
    """
    each = [(rule, step, f"{rule.rule.path}:{step.line}") for rule in rules for step in rule.rule.steps]
    joint = [there for rule, step, there in each if isinstance(step, Evict) and is_joint(rule.rule, step, rule.params)]
    marks = [there for _, step, there in each if isinstance(step, Mark)]
    if joint and marks:
        raise EditError(
            "heads cannot share a budget in caches with markers, whose empty slots are told by the first head's keys",
            where=[marks[0], joint[0]],
            remedy="heads: each, or a rule without marks",
        )


def choose_pairs(
    ctx: Context,
    step: Select,
    scores: Node,
    valid: Node | None,
    among: Node | None,
    stay: tuple[int, int, Length] | None,
) -> tuple[Node | None, Node]:
    """Choose keys over all heads of a block.

    Args:
        scores: float32 [B, H, T].
        stay: how many first and last tokens do in any case, and how many keys of a head on average; None: all keys.

    Returns:
        int64 [B, H, k], head * T + token, ascending, or None for all; and the head of each, -1 for padding.
    """
    call, (rows, heads, tokens) = ctx.editor.call, (ctx.editor.size(scores, dim) for dim in range(3))
    if stay is not None:
        first, last, count = stay
        floor = Fraction(step.floor)
        how = (floor.numerator, floor.denominator, step.floor_by)
        pairs = call(tokred.keep_pairs.default, scores, valid, among, first, last, count, *how)
        return pairs, call(tokred.pair_owners.default, pairs, valid, tokens)
    every = ctx.editor.arithmetic(lambda h, t: h * t, heads, tokens)
    pairs = call(aten.arange.default, every, device=scores.meta["val"].device)
    pairs = call(aten.expand.default, call(aten.view.default, pairs, [1, heads, tokens]), [rows, heads, tokens])
    return None, call(tokred.pair_owners.default, pairs, valid, tokens)


def check_joint(ctx: Context, step: Evict) -> None:
    """Refuse at the prompt what later steps could not read.

    Raises:
        EditError: it names the attention, or what does not go together.
    """
    if step.positions == "rank":
        raise EditError(
            "keys cannot be numbered by rank where heads keep different numbers of them",
            found=f"heads: joint in '{step.keep}'",
            remedy="positions: keep, or heads: each",
        )
    for _, block, cache in _owned(ctx, step):
        _check_readers(ctx, block, cache)
        _held(ctx, block, cache)


def attend_to_owned(ctx: Context, step: Evict) -> None:
    """Let each head of a later step attend to its own slots of the caches that a prompt left."""
    done = []
    for index, block, cache in _owned(ctx, step):
        _check_readers(ctx, block, cache)
        _rewrite(ctx, index, block, cache)
        done.append(index)
    ctx.log.append({"verb": "evict", "at": step.at, "blocks": len(done), "note": "heads attend to their own slots"})
    ctx.refresh()


def _owned(ctx: Context, step: Evict) -> list[tuple[int, Block, Cache]]:
    each = resolve_caches(ctx.sites, step.at)
    full = [found for found in each if window_of(found[1].attention, ctx.sites.reach) is None]
    return [found for found in full if shares_budget(ctx.sites, found[0])]


def _check_readers(ctx: Context, block: Block, cache: Cache) -> None:
    """Refuse an attention that cannot be written anew, and a cache that another block reads too."""
    why = fixed(ctx, block)
    if why is None:
        blocks = ctx.sites.stacks["decoder"].blocks
        others = [b for b in blocks if b is not block and unrepeated(b.attention.key, cache.key) is not None]
        why = f"'{place(others[0].attention.node)}' reads its keys, too" if others else None
    if why is not None:
        raise EditError(
            "heads of this attention cannot share a budget",
            where=[place(block.attention.node)],
            found=why,
            remedy="heads: each",
        )


def _held(ctx: Context, block: Block, cache: Cache) -> tuple[Node, Node]:
    """Keys and values [B, H, T, D] as the cache has them, which attention reads, each head repeated in place."""
    site = block.attention
    key, value = unrepeated(site.key, _read(cache.key)), unrepeated(site.value, _read(cache.value))
    if key is None or value is None or site.query.meta["val"].shape[1] % key.meta["val"].shape[1]:
        raise EditError(
            "heads cannot share a budget where attention reads something else than the cache holds",
            where=[place(site.node)],
            found=str(tuple(cache.key.meta["val"].shape)),
            remedy="heads: each",
        )
    return key, value


def _read(node: Node) -> Node:
    """What attention reads, of which an edit hands back a part."""
    return node.args[0] if is_left_out(node) else node


def _rewrite(ctx: Context, index: int, block: Block, cache: Cache) -> None:
    site, call, editor = block.attention, ctx.editor.call, ctx.editor
    key, value = _held(ctx, block, cache)
    with editor.before(site.node):
        mask = mask_of(ctx, site, key)
        owners = _owners(ctx, index, cache, site, mask)
        seen = None if mask is None else call(aten.slice.Tensor, mask, -1, editor.size(cache.past, 2), MAX)
        how = (site.scale, site.softcap, *ctx.attention_sinks(site))
        made = call(tokred.attend_owned.default, site.query, key, value, owners, seen, *how)
    old, new = site.node.meta["val"], made.meta["val"]
    if old.dtype != new.dtype or old.ndim != new.ndim:
        raise EditError(
            "attention to slots of each head is of another kind",
            where=[place(site.node)],
            found=f"{new.dtype} {tuple(new.shape)} for {old.dtype} {tuple(old.shape)}",
            remedy="heads: each, which leaves the attention as it is",
        )
    made.meta.update({name: held for name, held in site.node.meta.items() if name not in made.meta})
    editor.replace(site.node, made)


def _owners(ctx: Context, index: int, cache: Cache, site: Attention, mask: Node | None) -> Node:
    """The heads of all slots of a block's cache, int64 [B, H, T], which later steps are told, too."""
    call, past = ctx.editor.call, cache.past.meta["val"]
    with ctx.program.fake_mode:
        like = past.new_empty(past.shape[:3], dtype=torch.int64)
    held = take(ctx.program, owners_name(index), like, "which heads its cached keys are of")
    rows, heads = (ctx.editor.size(cache.past, dim) for dim in (0, 1))
    own = call(aten.view.default, call(aten.arange.default, heads, device=past.device), [1, heads, 1])
    if mask is not None:  # the newest query sees every real token of its step
        real = call(tokred.real_keys.default, mask, cache.key)
        real = call(aten.slice.Tensor, real, 1, ctx.editor.size(cache.past, 2), MAX)
        none = call(aten.full_like.default, own, -1)
        own = call(aten.where.self, call(aten.unsqueeze.default, real, 1), own, none)
    own = call(aten.expand.default, own, [rows, heads, ctx.editor.size(site.query, 2)])
    owners = call(aten.cat.default, [held, own], 2)
    hand_on(ctx.program, owners_name(index), owners)
    return owners
