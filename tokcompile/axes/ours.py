"""Axis rules of tokcompile's own operators, which earlier edits put into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from tokcompile.axes.assigning import batched, centres, crossed, slots, spread, super_tokens, weights
from tokcompile.axes.atoms import fresh, product, resolve, same
from tokcompile.axes.context import Context, Dims, shape
from tokcompile.axes.merging import merge_weights, mix_tokens, nearest, pool_matrix, representatives
from tokcompile.axes.products import attention
from tokcompile.axes.rules import like_first, pointwise


def gather_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::gather_tokens: one dimension becomes that of the token map, whose indices are of what it was."""
    value, chosen, where, batch = node.args[:4]
    dims = list(ctx.of(value))
    new = resolve(ctx.of(chosen)[1])
    origin = new[0].origin if len(new) == 1 else None
    if origin is not None and same(product(resolve(origin)), product(resolve(dims[where]))):
        ctx.unify(node, dims[where], origin)
    dims[where] = new
    if batch != where:
        ctx.unify(node, dims[batch], ctx.of(chosen)[0])
        dims[batch] = dims[batch] or ctx.of(chosen)[0]
    return dims


def kept_indices(ctx: Context, node: Node) -> Dims:
    """tokred::kept_indices: a new axis that remembers the axis it was cut from."""
    batch, old = ctx.of(node.args[0])
    made = fresh(shape(node)[1])
    if made:
        made[0].origin, made[0].via = resolve(old), node
    return [batch, made]


def token_source(ctx: Context, node: Node) -> Dims:
    """tokred::token_source: a new axis that remembers the axis its indices are of."""
    batch, old = ctx.of(node.args[1])
    made = fresh(shape(node)[1])
    if made:
        made[0].origin, made[0].via = resolve(old), node
    return [batch or ctx.of(node.args[0])[0], made]


def inserted_source(ctx: Context, node: Node) -> Dims:
    """tokred::inserted_source: the axis of the longer sequence remembers the one that it was made from."""
    fresh_dims, old = ctx.of(node.args[0]), ctx.of(node.args[1])
    made = resolve(fresh_dims[1])
    if len(made) == 1:
        made[0].origin, made[0].via = resolve(old[1]), node
    return [old[0] or fresh_dims[0], made]


def original_places(ctx: Context, node: Node) -> Dims:
    """tokred::original_places: one number for each old token."""
    return ctx.of(node.args[1])[:2]


def end_places(ctx: Context, node: Node) -> Dims:
    """tokred::end_places: some tokens of each row, which are counted anew."""
    return [ctx.of(node.args[0])[0], fresh(shape(node)[1])]


def insert_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::insert_tokens: the longer sequence, each token of the same width as before."""
    value, chosen = ctx.of(node.args[0]), ctx.of(node.args[1])
    ctx.unify(node, value[2], ctx.of(node.args[3])[2])
    return [value[0] or chosen[0], chosen[1], value[2]]


def flagged_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::flagged_tokens: some of the tokens, which are counted anew."""
    value, flags, like = (ctx.of(each) for each in node.args[:3])
    for one, other in ((value[1], flags[1]), (flags[1], like[1]), (flags[0], like[0])):
        ctx.unify(node, one, other)
    return [flags[0] or like[0] or value[0], fresh(shape(node)[1]), *value[2:]]


def listed_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::listed_tokens: tokens that are counted anew."""
    like, flags = (ctx.of(each) for each in node.args[:2])
    for one, other in ((flags[1], like[1]), (flags[0], like[0])):
        ctx.unify(node, one, other)
    return [flags[0] or like[0], fresh(shape(node)[1])]


def add_tokens(ctx: Context, node: Node) -> Dims:
    """tokred::add_tokens: the sequence as it was."""
    dims, flags, more = (list(ctx.of(each)) for each in node.args[:3])
    for one, other in ((dims[0], flags[0]), (dims[1], flags[1]), (dims[0], more[0]), (dims[2], more[2])):
        ctx.unify(node, one, other)
    return dims


def mark_slots(ctx: Context, node: Node) -> Dims:
    """tokred::mark_slots: a new axis, whose origin `slot_source` names."""
    return [ctx.of(node.args[0])[0], fresh(shape(node)[1])]


def slot_source(ctx: Context, node: Node) -> Dims:
    """tokred::slot_source: the axis of the slots remembers the axis that they were made of."""
    batch, old = ctx.of(node.args[1])
    slots, made = ctx.of(node.args[0])
    ctx.unify(node, slots, batch)
    if made:
        made[0].root().origin, made[0].root().via = resolve(old), node
    return [batch or slots, made]


def by_slot(ctx: Context, node: Node) -> Dims:
    """tokred::mark_tokens and slot_means: the slots, each of the width of a token."""
    ctx.unify(node, ctx.of(node.args[0])[0], ctx.of(node.args[1])[0])
    return [ctx.of(node.args[0])[0], ctx.of(node.args[1])[1], ctx.of(node.args[0])[2]]


def masked_mean(ctx: Context, node: Node) -> Dims:
    """tokred::masked_mean: one token for each row."""
    ctx.unify(node, ctx.of(node.args[0])[1], ctx.of(node.args[1])[1])
    return [ctx.of(node.args[0])[0], ctx.of(node.args[0])[2]]


def clear_slots(ctx: Context, node: Node) -> Dims:
    """tokred::clear_slots: a cache, whose tokens align with those of the mask."""
    dims, (rows, tokens) = list(ctx.of(node.args[0])), ctx.of(node.args[1])
    ctx.unify(node, dims[0], rows)
    ctx.unify(node, dims[2], tokens)
    return dims


def held_slots(ctx: Context, node: Node) -> Dims:
    """tokred::held_slots: rows and tokens of a cache."""
    dims = ctx.of(node.args[0])
    return [dims[0], dims[2]]


def match_pairs(ctx: Context, node: Node) -> Dims:
    """tokred::match_pairs: three lists in one."""
    return [ctx.of(node.args[0])[0], fresh(shape(node)[1])]


def merge_pairs(ctx: Context, node: Node) -> Dims:
    """tokred::merge_pairs: the tokens that stay, each of the same width as before."""
    return [ctx.of(node.args[0])[0], ctx.of(node.args[2])[1], ctx.of(node.args[0])[2]]


def inverse_map(ctx: Context, node: Node) -> Dims:
    """tokred::inverse_map: one number for each old token."""
    return ctx.of(node.args[3])[:2]


def slot_positions(ctx: Context, node: Node) -> Dims:
    """tokred::slot_positions: a position for each new token and frequency."""
    return [*ctx.of(node.args[1])[:2], fresh(shape(node)[2])]


def phase_scan(ctx: Context, node: Node) -> Dims:
    """tokred::phase_scan: heads stand before tokens, and each has a phase for every frequency."""
    rows, tokens, heads = ctx.of(node.args[0])
    if isinstance(node.args[1], Node):
        for own, other in zip((rows, tokens), ctx.of(node.args[1]), strict=True):
            if own and other:
                ctx.unify(node, own, other)
    return [rows, heads, tokens, fresh(shape(node)[3])]


def received(ctx: Context, node: Node) -> Dims:
    """tokred::attention_received, attention_row and key_viewers: one number per key."""
    key = ctx.of(node.args[1])
    return [key[0], key[-2]]


def key_received(ctx: Context, node: Node) -> Dims:
    """tokred::key_attention: one number per key and cached head."""
    key = ctx.of(node.args[1])
    return [key[0], fresh(shape(node)[1]), key[-2]]


def chosen_keys(ctx: Context, node: Node) -> Dims:
    """tokred::keep_keys, keep_pairs and pairwise_keys: for each head as many keys, which are counted anew."""
    rows, heads, _ = ctx.of(node.args[0])
    return [rows, heads, fresh(shape(node)[2])]


def gathered_keys(ctx: Context, node: Node) -> Dims:
    """tokred::gather_keys, gather_pairs and merge_keys: a cache of as many tokens as there are indices."""
    dims, index = list(ctx.of(node.args[0])), ctx.of(node.args[1])
    dims[2] = index[2]
    return dims


def joined_scores(ctx: Context, node: Node) -> Dims:
    """tokred::join_key_scores: as each of the scores."""
    first, *others = node.args[0]
    for other in others:
        for one, two in zip(ctx.of(first), ctx.of(other), strict=True):
            ctx.unify(node, one, two)
    return list(ctx.of(first))


def mean_query(ctx: Context, node: Node) -> Dims:
    """tokred::mean_query: one query for each head."""
    rows, heads, _, width = ctx.of(node.args[0])
    return [rows, heads, width]


def scored_keys(ctx: Context, node: Node) -> Dims:
    """tokred::key_votes and pair_scores: one number per key and choosing head."""
    key = ctx.of(node.args[1])
    return [key[0], fresh(shape(node)[1]), key[2]]


def seen_keys(ctx: Context, node: Node) -> Dims:
    """tokred::seen_keys: queries by keys, where queries see different keys."""
    query, key = ctx.of(node.args[1]), ctx.of(node.args[2])
    rows = query[2] if same(product(query[2]), shape(node)[2]) else ()
    return [query[0], (), rows, key[2]]


def real_keys(ctx: Context, node: Node) -> Dims:
    """tokred::real_keys: rows and keys."""
    key = ctx.of(node.args[1])
    return [key[0], key[2]]


def key_positions(ctx: Context, node: Node) -> Dims:
    """tokred::key_positions: rows and keys."""
    key = ctx.of(node.args[2])
    return [key[0], key[2]]


def gathered_mask(ctx: Context, node: Node) -> Dims:
    """tokred::gather_mask: queries by chosen keys."""
    mask, index = ctx.of(node.args[0]), ctx.of(node.args[1])
    rows = mask[-2] if len(mask) > 1 else ()
    return [index[0], fresh(shape(node)[1]), rows, index[2]]


def attend(ctx: Context, node: Node) -> Dims:
    """tokred::attend and attend_owned: queries as they were, as wide as the values."""
    query, value = ctx.of(node.args[0]), ctx.of(node.args[2])
    return [*query[:-1], value[-1]]


def reused_keys(ctx: Context, node: Node) -> Dims:
    """tokred::reuse_keys: as many keys as the new choice has."""
    return ctx.of(node.args[1])


def leading(count: int) -> Callable[[Context, Node], Dims]:
    """Operators that keep only the first dimensions of their first argument."""
    return lambda ctx, node: list(ctx.of(node.args[0])[:count])


def token_distances(ctx: Context, node: Node) -> Dims:
    """tokred::token_distances: from each token, to each token."""
    rows, tokens, _ = ctx.of(node.args[0])
    return [rows, tokens, tokens]


def farthest_mask(ctx: Context, node: Node) -> Dims:
    """tokred::farthest_mask: the tokens that the walk goes through."""
    return ctx.of(node.args[1])


def clip_source(ctx: Context, node: Node) -> Dims:
    """tokred::clip_source: the tokens that are left of each video."""
    return [ctx.of(node.args[0])[0], fresh(shape(node)[1])]


OURS: dict[str, Callable[[Context, Node], Any]] = {
    "gather_tokens": gather_tokens,
    "kept_indices": kept_indices,
    "token_source": token_source,
    "inserted_source": inserted_source,
    "original_places": original_places,
    "end_places": end_places,
    "insert_tokens": insert_tokens,
    "flagged_tokens": flagged_tokens,
    "listed_tokens": listed_tokens,
    "matching_tokens": leading(2),
    "attend_after": like_first,
    "add_tokens": add_tokens,
    "mark_slots": mark_slots,
    "slot_source": slot_source,
    "slot_means": by_slot,
    "mark_tokens": by_slot,
    "masked_mean": masked_mean,
    "clear_slots": clear_slots,
    "held_slots": held_slots,
    "long_runs": like_first,
    "match_pairs": match_pairs,
    "clip_stays": leading(3),
    "clip_source": clip_source,
    "merge_clips": like_first,
    "merge_pairs": merge_pairs,
    "inverse_map": inverse_map,
    "attention_received": received,
    "attention_row": received,
    "attention": attention,
    "key_attention": key_received,
    "key_viewers": received,
    "smooth_keys": like_first,
    "key_cosine": leading(3),
    "random_keys": leading(3),
    "keep_keys": chosen_keys,
    "keep_pairs": chosen_keys,
    "pairwise_keys": chosen_keys,
    "gather_keys": gathered_keys,
    "gather_pairs": gathered_keys,
    "pair_owners": like_first,
    "join_key_scores": joined_scores,
    "unturn_keys": like_first,
    "assign_keys": leading(3),
    "merge_keys": gathered_keys,
    "mean_query": mean_query,
    "turn_pairs": like_first,
    "key_votes": scored_keys,
    "pair_scores": scored_keys,
    "seen_keys": seen_keys,
    "real_keys": real_keys,
    "key_positions": key_positions,
    "gather_mask": gathered_mask,
    "attend": attend,
    "attend_owned": attend,
    "alike": leading(1),
    "reuse_keys": reused_keys,
    "topk_mask": pointwise,
    "dilate": like_first,
    "dilate_by_width": like_first,
    "random_scores": like_first,
    "last_valid": leading(1),
    "token_norm": leading(2),
    "token_cosine": leading(2),
    "token_distances": token_distances,
    "nearest_distance": leading(2),
    "farthest_mask": farthest_mask,
    "fill_mask": pointwise,
    "splice_values": like_first,
    "window_topk_mask": like_first,
    "transport_cost": crossed,
    "transport_cost_over_time": crossed,
    "transport_plan": like_first,
    "transport_weights": weights,
    "density_peaks": centres,
    "cluster_labels": leading(2),
    "cluster_slots": slots,
    "super_token_affinity": batched,
    "super_token_pool": super_tokens,
    "super_token_spread": spread,
    "mix_tokens": mix_tokens,
    "merge_weights": merge_weights,
    "nearest_tokens": nearest,
    "strided_tokens": representatives,
    "first_members": representatives,
    "kmeans_assign": leading(2),
    "pool_matrix": pool_matrix,
    "elbow": leading(1),
    "variable_positions": pointwise,
    "image_starts": pointwise,
    "close_gaps": pointwise,
    "slot_positions": slot_positions,
    "phase_scan": phase_scan,
}
