"""route: let each step after a prompt attend to few of the cached keys, chosen anew; the cache stays whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from tokcompile.binding import RuleInstance
from tokcompile.editing.edit import length_value
from tokcompile.errors import EditError
from tokcompile.expr import substitute
from tokcompile.passes.context import Context
from tokcompile.passes.pairtable import ByPairs
from tokcompile.passes.routing import Chooser, Routed
from tokcompile.passes.votes import ByVotes
from tokcompile.program import place
from tokcompile.sites import Block, resolve_blocks, resolve_caches, window_of
from tokcompile.sites.attention import Attention, softmax_of
from tokcompile.sites.cache import Cache, handed_back, unrepeated
from tokcompile.steps import Drop, Evict, Insert, Mark, Merge, Place, Route

aten = torch.ops.aten
tokred = torch.ops.tokred

METHODS: Mapping[str, type[Chooser]] = {"votes": ByVotes, "frequencies": ByPairs}
"""By the name that `by:` has, who scores and places the keys."""
_MOVES = (Drop, Merge, Mark, Insert, Place)


def check_routes(rules: Sequence[RuleInstance]) -> None:
    """Refuse rules of which one chooses among keys that another has taken away or moved.

    Raises:
        EditError: it names both steps.
    """
    each = [(rule, step, f"{rule.rule.path}:{step.line}") for rule in rules for step in rule.rule.steps]
    for rule, route_step, here in each:
        if not isinstance(route_step, Route):
            continue
        ranked = substitute(route_step.positions, dict(rule.params)) == "rank"
        for _, step, there in each:
            if isinstance(step, Evict):
                raise EditError(
                    "keys of a cache cannot be evicted and chosen from",
                    where=[there, here],
                    found="after an eviction the heads of a cache hold different tokens",
                    remedy="use one of the two rules",
                )
            if ranked and isinstance(step, _MOVES):
                raise EditError(
                    "keys are to have their ranks as positions, and their own are not known",
                    where=[there, here],
                    found=f"'{step.verb}': positions of the prompt's tokens are no longer 0, 1, 2...",
                    remedy="positions: keep",
                )


def route(ctx: Context, step: Route) -> None:
    """Rewrite the attention of the blocks in a later step; a prompt's graph is checked, and stays as it is."""
    found, windowed = _blocks(ctx, step)
    record: dict[str, object] = {"verb": "route", "at": step.at, "by": step.by, "blocks": len(found)}
    if windowed:
        record["windows"] = sorted(windowed)
    ctx.log.append(record)
    chooser = METHODS[step.by](ctx, step, [block for _, block, _ in found])
    if ctx.sites.phase == "prefill":
        record["note"] = "later steps choose keys; a prompt attends to all"
        for index, block, cache in found:
            chooser.prepare(index, block, _held(ctx, block.attention, cache)[0])
        return
    kept = [_rewrite(ctx, step, chooser, *each) for each in found]
    record["keys"] = ", ".join(dict.fromkeys(kept))
    ctx.refresh()


def _blocks(ctx: Context, step: Route) -> tuple[list[tuple[int, Block, Cache]], list[int]]:
    """The blocks with caches of their own text, and the numbers of those that attend in a window."""
    outputs, found = ctx.program.output.all_input_nodes, []
    # A window that is shorter than its prompt hands back a part of its keys, which is no cache to choose from.
    blocks = [(i, b) for i, b in resolve_blocks(ctx.sites, step.at) if b not in ctx.sites.caches]
    windowed = [i for i, b in blocks if handed_back(b, ctx.sites.reach, outputs)]
    for index, block, cache in resolve_caches(ctx.sites, step.at):
        if window_of(block.attention, ctx.sites.reach) is not None:
            windowed.append(index)
            continue
        _check_site(ctx, block)
        found.append((index, block, cache))
    if windowed and not found:
        raise EditError(
            "no attention can choose among keys: every block attends in a window",
            where=[step.at],
            found=f"windows in blocks {', '.join(map(str, sorted(windowed)))}",
            remedy="use the rule on a model whose attention sees all keys",
        )
    return found, windowed


def _check_site(ctx: Context, block: Block) -> None:
    """Refuse an attention that cannot be written anew."""
    why = fixed(ctx, block)
    if why is not None:
        raise EditError("this attention cannot choose among its keys", where=[place(block.attention.node)], found=why)


def fixed(ctx: Context, block: Block) -> str | None:
    """Why an attention cannot be written anew; None where it can."""
    site, why = block.attention, None
    if site.node.target in (tokred.attend.default, tokred.attend_owned.default):
        why = "an earlier step chooses among its keys"
    elif site.partial:
        why = "the model adds several masks to its scores"
    elif site.query.meta["val"].ndim != 4:
        why = f"queries {tuple(site.query.meta['val'].shape)}, whose heads and rows are one dimension"
    elif ctx.sites.phase == "decode" and _weights_are_read(ctx, site):
        why = "its weights are an output (output_attentions), and would be those of all keys"
    elif ctx.sites.phase == "decode" and site.is_causal and site.padding is None:
        why = "its causal flag counts keys from the first one, in a step whose keys begin earlier than its queries"
    return why


def _weights_are_read(ctx: Context, site: Attention) -> bool:
    node, reach = softmax_of(site), ctx.sites.reach
    while node is not None and node is not site.node:
        if any(user not in reach.order or not reach.above(user, site.node) for user in node.users):
            return True
        node = next((user for user in node.users if reach.above(user, site.node)), None)
    return False


def _held(ctx: Context, site: Attention, cache: Cache) -> tuple[Node, Node]:
    """Keys and values [B, Hkv, N, D] before they are repeated for heads of queries, where that is plain to see."""
    key, value = unrepeated(site.key, cache.key), unrepeated(site.value, cache.value)
    if key is not None and value is not None:
        return key, value
    if not site.key_transposed:
        return site.key, site.value
    with ctx.editor.before(site.node):
        return ctx.editor.call(aten.transpose.int, site.key, -2, -1), site.value


def _rewrite(ctx: Context, step: Route, chooser: Chooser, index: int, block: Block, cache: Cache) -> str:
    """Let one attention read chosen keys alone; returns how many, in words."""
    site, call, editor = block.attention, ctx.editor.call, ctx.editor
    key, value = _held(ctx, site, cache)
    with editor.before(site.node):
        queries, tokens = editor.size(site.query, 2), editor.size(key, 2)
        own = max(int(step.recent), 1)
        last = editor.arithmetic(lambda m: torch.sym_max(m, own), queries)
        keep = int(step.keep) - own
        count = editor.arithmetic(lambda n, end: torch.sym_min(n, end + keep), tokens, last)
        if isinstance(length_value(count), int) and length_value(count) == length_value(tokens):
            return f"all {length_value(tokens)}"
        mask = mask_of(ctx, site, key)
        valid = None if mask is None else call(tokred.real_keys.default, mask, key)
        routed = Routed(index, block, key, valid, queries, tokens, last, count)
        scores = chooser.score(routed)
        chosen = call(tokred.keep_keys.default, scores, valid, None, int(step.sinks), last, count)
        chosen = chooser.settle(routed, chosen)
        keys, values = (call(tokred.gather_keys.default, each, chosen) for each in (key, value))
        query, keys = chooser.place(routed, chosen, keys)
        seen = None if mask is None else call(tokred.gather_mask.default, mask, chosen)
        how = (site.scale, site.softcap, *ctx.attention_sinks(site))
        made = call(tokred.attend.default, query, keys, values, seen, *how)
    made.meta.update({name: held for name, held in site.node.meta.items() if name not in made.meta})
    if made.meta["val"].dtype != site.node.meta["val"].dtype:
        raise EditError("attention to chosen keys has another dtype", where=[place(site.node)])
    editor.replace(site.node, made)
    return f"{length_value(count)} of {length_value(tokens)}"


def mask_of(ctx: Context, site: Attention, key: Node) -> Node | None:
    """The mask of an attention, its last dimension that of the keys; None without one."""
    if site.padding is not None:
        return ctx.editor.call(tokred.seen_keys.default, site.padding, site.query, key, site.is_causal)
    if site.mask is None:
        return None
    columns, keys = site.mask.meta["val"].shape[-1], key.meta["val"].shape[2]
    if isinstance(columns, int) and columns != keys:
        raise EditError(
            "the mask of an attention is not one of its keys",
            where=[place(site.node)],
            found=f"{columns} columns for {keys} keys",
        )
    return site.mask
