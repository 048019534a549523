"""What holds for every op alike: one node when captured, ATen when compiled, any batch size."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tokcompile.kernels as kernels
from tokcompile.kernels import _library

ops = torch.ops.tokred
CROSS = [0, 0, 0, -1, 1], [0, -1, 1, 0, 0]
ATTENTION = (0.5, True, 0.0, "mean")


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def bools(*shape: int) -> torch.Tensor:
    return floats(*shape) > 0


def slots(batch: int) -> torch.Tensor:
    """Two of six places in each row."""
    return torch.stack([(torch.arange(6) == row % 5) | (torch.arange(6) == 5) for row in range(batch)])


def chosen(batch: int) -> torch.Tensor:
    """Five of twelve places of each of two heads, ascending."""
    return torch.stack([(torch.arange(5) * 2 + head) for head in (0, 1)]).expand(batch, 2, 5).clone()


def _pairs(batch: int) -> tuple[torch.Tensor, ...]:
    lists = torch.arange(9), torch.arange(9, 12), torch.arange(3)
    return tuple(each.expand(batch, -1).clone() for each in lists)


# op -> (tensor arguments whose first dimension is the batch, call). The last test sees that no op is missing.
CASES: dict[str, tuple[Callable[[int], tuple[torch.Tensor, ...]], Callable[..., torch.Tensor]]] = {
    "gather_tokens": (
        lambda b: (floats(b, 12, 4), torch.arange(5 * b).view(b, 5) % 12),
        lambda x, source: ops.gather_tokens(x, source, 1, 0),
    ),
    "attention": (
        lambda b: (floats(b, 4, 6, 8), floats(b, 2, 12, 8), floats(b, 2, 12, 8).sin(), bools(b, 15)),
        lambda q, k, v, padding: ops.attention(q, k, v, padding, 0.5, True),
    ),
    "kept_indices": (lambda b: (bools(b, 12),), lambda keep: ops.kept_indices(keep, 5)),
    "topk_mask": (lambda b: (floats(b, 12), bools(b, 12)), lambda s, among: ops.topk_mask(s, among, 5)),
    "dilate": (lambda b: (bools(b, 12),), lambda mask: ops.dilate(mask, *CROSS, 3, 4, "clamp_flat")),
    "dilate_by_width": (
        lambda b: (bools(b, 12), torch.arange(b) % 4 + 1),
        lambda mask, width: ops.dilate_by_width(mask, *CROSS, width, "grid"),
    ),
    "fill_mask": (
        lambda b: (bools(b, 12), floats(b, 12), bools(b, 12)),
        lambda first, s, among: ops.fill_mask([first], s, among, 5),
    ),
    "attention_received": (
        lambda b: (floats(b, 4, 12, 8), floats(b, 2, 12, 8), bools(b, 1, 1, 12), bools(b, 12)),
        lambda q, k, mask, rows: ops.attention_received(q, k, mask, rows, *ATTENTION, "mean"),
    ),
    "attention_row": (
        lambda b: (floats(b, 4, 12, 8), floats(b, 2, 12, 8), bools(b, 1, 12, 12), torch.arange(b) % 12),
        lambda q, k, mask, index: ops.attention_row(q, k, mask, index, *ATTENTION),
    ),
    "key_attention": (
        lambda b: (floats(b, 4, 12, 8), floats(b, 2, 12, 8), bools(b, 1, 1, 12), bools(b, 12)),
        lambda q, k, mask, valid: ops.key_attention(q, k, mask, valid, 3, 2, *ATTENTION, "sum"),
    ),
    "smooth_keys": (
        lambda b: (floats(b, 2, 12).abs(), bools(b, 12)),
        lambda scores, valid: ops.smooth_keys(scores, valid, 2, 3, "avg"),
    ),
    "key_cosine": (lambda b: (floats(b, 2, 12, 8), bools(b, 12)), lambda x, valid: ops.key_cosine(x, valid)),
    "random_keys": (lambda b: (floats(b, 2, 12, 8), bools(b, 12)), lambda x, valid: ops.random_keys(x, valid, 3)),
    "keep_keys": (
        lambda b: (floats(b, 2, 12), bools(b, 12), bools(b, 12).flip(1)),
        lambda scores, valid, among: ops.keep_keys(scores, valid, among, 1, 2, 5),
    ),
    "keep_pairs": (
        lambda b: (floats(b, 2, 12), bools(b, 12), bools(b, 12).flip(1)),
        lambda scores, valid, among: ops.keep_pairs(scores, valid, among, 1, 2, 9, 1, 5, "blend"),
    ),
    "gather_pairs": (
        lambda b: (floats(b, 2, 12, 4), torch.arange(10 * b).view(b, 2, 5) % 24),
        lambda x, pairs: ops.gather_pairs(x, pairs),
    ),
    "pair_owners": (
        lambda b: (torch.arange(10 * b).view(b, 2, 5) % 24, bools(b, 12)),
        lambda pairs, valid: ops.pair_owners(pairs, valid, 12),
    ),
    "attend_owned": (
        lambda b: (
            floats(b, 4, 3, 8),
            floats(b, 2, 5, 8),
            floats(b, 2, 5, 6),
            torch.arange(10 * b).view(b, 2, 5) % 2,
            bools(b, 1, 3, 3) | (torch.arange(3) == 2),
        ),
        lambda q, k, v, owners, mask: ops.attend_owned(q, k, v, owners, mask, 0.3, 5.0, None),
    ),
    "pairwise_keys": (
        lambda b: (floats(b, 2, 12), bools(b, 12), torch.arange(b)),
        lambda scores, valid, turn: ops.pairwise_keys(scores, valid, turn, 1, 2, 5, 7),
    ),
    "key_viewers": (
        lambda b: (floats(b, 4, 12, 8), floats(b, 2, 12, 8), bools(b, 1, 1, 12), bools(b, 12)),
        lambda q, k, mask, valid: ops.key_viewers(q, k, mask, valid, 3, True),
    ),
    "gather_keys": (
        lambda b: (floats(b, 2, 12, 4), torch.arange(10 * b).view(b, 2, 5) % 12),
        lambda x, index: ops.gather_keys(x, index),
    ),
    "join_key_scores": (
        lambda b: (floats(b, 2, 12).abs(), floats(b, 2, 12).sin().abs(), bools(b, 12)),
        lambda one, other, valid: ops.join_key_scores([one, other], valid, 2, True, "max"),
    ),
    "unturn_keys": (
        lambda b: (floats(b, 2, 12, 6), floats(b, 1, 12, 4).cos(), floats(b, 1, 12, 4).sin()),
        lambda keys, cos, sin: ops.unturn_keys(keys, cos, sin, False),
    ),
    "assign_keys": (
        lambda b: (floats(b, 2, 12, 4), floats(b, 2, 12, 3), floats(b, 2, 12).abs(), chosen(b), bools(b, 12)),
        lambda k, v, s, index, valid: ops.assign_keys(k, v, s, index, valid, None, 1, 2, 0.1, 0.1),
    ),
    "merge_keys": (
        lambda b: (
            floats(b, 2, 12, 4),
            chosen(b),
            torch.arange(24 * b).view(b, 2, 12) % 6,
            floats(b, 2, 12).abs(),
            floats(b, 2, 12, 4).sin(),
            floats(b, 1, 12, 4).cos(),
            floats(b, 1, 12, 4).sin(),
        ),
        lambda *tensors: ops.merge_keys(*tensors, True),
    ),
    "mean_query": (lambda b: (floats(b, 4, 3, 8), bools(b, 12)), lambda q, valid: ops.mean_query(q, valid)),
    "turn_pairs": (
        lambda b: (
            floats(b, 2, 12, 8),
            torch.arange(12 * b).view(b, 12),
            torch.arange(12 * b).view(b, 12) % 7,
            torch.tensor([[1.0, 0.3, 0.01]]).repeat(b, 1),
        ),
        lambda x, here, there, frequencies: ops.turn_pairs(x, here, there, frequencies, 1, False),
    ),
    "key_votes": (
        lambda b: (floats(b, 4, 8), floats(b, 2, 12, 8), bools(b, 12)),
        lambda q, k, valid: ops.key_votes(q, k, valid, 1, 2),
    ),
    "pair_scores": (
        lambda b: (
            floats(b, 4, 8),
            floats(b, 2, 12, 8),
            torch.tensor([[[0, 2], [1, 2]]]).repeat(b, 1, 1),
            bools(b, 12),
        ),
        lambda q, k, chosen, valid: ops.pair_scores(q, k, chosen, valid, 1, 3, True),
    ),
    "key_positions": (
        lambda b: (bools(b, 12).cumsum(1)[:, -3:] - 1, bools(b, 12), floats(b, 2, 12, 8)),
        lambda positions, valid, k: ops.key_positions(positions, valid, k),
    ),
    "seen_keys": (
        lambda b: (bools(b, 10), floats(b, 4, 3, 8), floats(b, 2, 12, 8)),
        lambda padding, q, k: ops.seen_keys(padding, q, k, True),
    ),
    "real_keys": (
        lambda b: (bools(b, 1, 3, 12), floats(b, 2, 12, 8)),
        lambda mask, k: ops.real_keys(mask, k),
    ),
    "gather_mask": (
        lambda b: (bools(b, 1, 3, 12), torch.arange(10 * b).view(b, 2, 5) % 12),
        lambda mask, index: ops.gather_mask(mask, index),
    ),
    "attend": (
        lambda b: (
            floats(b, 4, 3, 8),
            floats(b, 2, 5, 8),
            floats(b, 2, 5, 6),
            bools(b, 1, 3, 5) | (torch.arange(5) == 4),
        ),
        lambda q, k, v, mask: ops.attend(q, k, v, mask, 0.3, 5.0, None),
    ),
    "alike": (lambda b: (floats(b, 8), floats(b, 8).flip(1)), lambda one, other: ops.alike(one, other, 0.1)),
    "reuse_keys": (
        lambda b: (torch.arange(6 * b).view(b, 1, 6), torch.arange(8 * b).view(b, 1, 8), bools(b, 3)[:, 0]),
        lambda held, new, again: ops.reuse_keys(held, new, again, 3),
    ),
    "inserted_source": (lambda b: (slots(b), floats(b, 4)), lambda fresh, like: ops.inserted_source(fresh, like, None)),
    "original_places": (lambda b: (slots(b), floats(b, 4)), lambda fresh, like: ops.original_places(fresh, like)),
    "end_places": (
        lambda b: (floats(b, 12), bools(b, 12)),
        lambda like, valid: ops.end_places(like, valid, 2, 5),
    ),
    "insert_tokens": (
        lambda b: (floats(b, 4, 5), ops.inserted_source(slots(b), floats(b, 4), None), slots(b), floats(b, 2, 5)),
        lambda x, source, fresh, tokens: ops.insert_tokens(x, source, fresh, tokens),
    ),
    "flagged_tokens": (
        lambda b: (floats(b, 6, 2, 3), slots(b), floats(b, 6, 5)),
        lambda values, flags, like: ops.flagged_tokens(values, flags, like, 3),
    ),
    "listed_tokens": (lambda b: (floats(b, 6, 5), slots(b)), lambda x, flags: ops.listed_tokens(x, flags, 3)),
    "matching_tokens": (
        lambda b: (floats(b, 6, 5).sign(), floats(b, 5).sign()),
        lambda x, vectors: ops.matching_tokens(x, vectors),
    ),
    "attend_after": (
        lambda b: (floats(b, 2, 3, 8), floats(b, 2, 9, 8), floats(b, 2, 9, 8).sin(), bools(b, 6)),
        lambda q, k, v, seen: ops.attend_after(q, k, v, seen),
    ),
    "add_tokens": (
        lambda b: (floats(b, 6, 5), slots(b), floats(b, 3, 5)),
        lambda x, flags, more: ops.add_tokens(x, flags, more),
    ),
    "token_source": (
        lambda b: (torch.arange(5 * b).view(b, 5) % 12, floats(b, 12)),
        lambda index, like: ops.token_source(index, like),
    ),
    "match_pairs": (lambda b: (floats(b, 12, 4),), lambda metric: ops.match_pairs(metric, 3, 1)),
    "merge_pairs": (
        lambda b: (floats(b, 12, 4), bools(b, 12) + 1.0, *_pairs(b)),
        lambda x, size, source, given, into: ops.merge_pairs(x, size, source, given, into, True),
    ),
    "inverse_map": (
        lambda b: (*_pairs(b), floats(b, 12)),
        lambda source, given, into, like: ops.inverse_map(source, given, into, like),
    ),
    "last_valid": (lambda b: (bools(b, 12),), lambda mask: ops.last_valid(mask)),
    "random_scores": (lambda b: (floats(b, 12),), lambda like: ops.random_scores(like, 3)),
    "splice_values": (
        lambda b: ((torch.arange(12) % 3 == 0).expand(b, 12).clone(), floats(b, 4)),
        lambda mask, values: ops.splice_values(mask, values, -1.0),
    ),
    "long_runs": (lambda b: (bools(b, 12),), lambda mask: ops.long_runs(mask, 2)),
    "mark_slots": (lambda b: (bools(b, 12),), lambda runs: ops.mark_slots(runs, 11)),
    "slot_source": (
        lambda b: (torch.arange(11 * b).view(b, 11) % 9 - 4, bools(b, 12)),
        lambda slots, like: ops.slot_source(slots, like),
    ),
    "slot_means": (
        lambda b: (floats(b, 12, 4), ops.mark_slots(bools(b, 12), 11)),
        lambda x, slots: ops.slot_means(x, slots),
    ),
    "mark_tokens": (
        lambda b: (floats(b, 12, 4), ops.mark_slots(bools(b, 12), 11), floats(b, 4)),
        lambda x, slots, content: ops.mark_tokens(x, slots, content),
    ),
    "masked_mean": (lambda b: (floats(b, 12, 4), bools(b, 12)), lambda x, mask: ops.masked_mean(x, mask)),
    "clear_slots": (lambda b: (floats(b, 2, 12, 4), bools(b, 12)), lambda x, filled: ops.clear_slots(x, filled)),
    "held_slots": (
        lambda b: (ops.clear_slots(floats(b, 2, 12, 4), bools(b, 12)),),
        lambda x: ops.held_slots(x),
    ),
    "variable_positions": (
        lambda b: (torch.arange(12 * b).view(b, 12), bools(b, 12)),
        lambda positions, visual: ops.variable_positions(positions, visual, [64, 3], 256),
    ),
    "image_starts": (
        lambda b: (torch.arange(12 * b).view(b, 12), bools(b, 12)),
        lambda positions, visual: ops.image_starts(positions, visual, 3),
    ),
    "close_gaps": (
        lambda b: (
            torch.arange(0, 24 * b, 2).view(b, 12),
            torch.tensor([-1, 2, 2, 2, -1, 8, 8, 8, 14, 14, -1, -1]).repeat(b, 1),
        ),
        lambda positions, starts: ops.close_gaps(positions, starts),
    ),
    "slot_positions": (
        lambda b: (torch.arange(24 * b).view(b, 2, 12), torch.arange(10 * b).view(b, 5, 2) % 12),
        lambda positions, members: ops.slot_positions(positions, members, [0, 1, 1], [0, 0, 1]),
    ),
    "phase_scan": (
        lambda b: (floats(b, 12, 2), bools(b, 12), floats(b, 2, 4)),
        lambda z, valid, start: ops.phase_scan(z, valid, start, 4, 0),
    ),
    "token_norm": (lambda b: (floats(b, 12, 4),), lambda x: ops.token_norm(x, 2.0)),
    "token_distances": (lambda b: (floats(b, 12, 4),), lambda x: ops.token_distances(x)),
    "nearest_distance": (
        lambda b: (floats(b, 12, 12).abs(), bools(b, 12)),
        lambda distances, among: ops.nearest_distance(distances, among),
    ),
    "farthest_mask": (
        lambda b: (floats(b, 12, 12).abs(), floats(b, 12), bools(b, 12)),
        lambda distances, start, among: ops.farthest_mask(distances, start, among, 5),
    ),
    "token_cosine": (lambda b: (floats(b, 12, 4), floats(b, 4)), lambda x, r: ops.token_cosine(x, r)),
    "window_topk_mask": (lambda b: (floats(b, 24),), lambda scores: ops.window_topk_mask(scores, 4, 6, 2, 3, 2)),
    "transport_cost": (
        lambda b: (
            floats(b, 3, 8),
            floats(b, 5, 8),
            torch.arange(3 * b).view(b, 3) % 12,
            torch.arange(5 * b).view(b, 5) * 5 % 12,
        ),
        lambda kept, gone, here, there: ops.transport_cost(kept, gone, here, there, 3, 4, 0.5),
    ),
    "transport_cost_over_time": (
        lambda b: (floats(b, 3, 8), floats(b, 5, 8)),
        lambda kept, gone: ops.transport_cost_over_time(kept, gone, 2.0, 1.5),
    ),
    "transport_plan": (lambda b: (floats(b, 3, 5),), lambda cost: ops.transport_plan(cost, 0.1, 4)),
    "transport_weights": (
        lambda b: (
            floats(b, 3, 5).abs(),
            (torch.arange(8) % 3 == 1).expand(b, 8).clone(),
            bools(b, 8),
        ),
        lambda plan, keep, among: ops.transport_weights(plan, keep, among, "row"),
    ),
    "clip_stays": (lambda b: (floats(b, 5, 3, 8),), lambda x: ops.clip_stays(x, 4, 1, 1.5, 0.1, 2)),
    "clip_source": (
        lambda b: (
            (torch.arange(15 * b).view(b, 5, 3) % 3) * 3,
            (torch.arange(15) % 3 == 1).view(5, 3).expand(b, 5, 3) | (torch.arange(5) % 4 == 0)[:, None],
        ),
        lambda chosen, stays: ops.clip_source(chosen, stays, 9, 4, 1),
    ),
    "merge_clips": (
        lambda b: (
            floats(b, 12, 8),
            floats(b, 5, 3, 8),
            (torch.arange(15) % 3 == 1).view(5, 3).expand(b, 5, 3) | (torch.arange(5) % 4 == 0)[:, None],
        ),
        lambda tokens, x, stays: ops.merge_clips(tokens, x, stays, 1, 0, 4, 1, 1.5, 0.1, 2),
    ),
    "density_peaks": (lambda b: (floats(b, 12, 4),), lambda x: ops.density_peaks(x, 6, 5)),
    "cluster_labels": (
        lambda b: (floats(b, 12, 4), torch.arange(12).flip(0)[:5].expand(b, 5).clone()),
        lambda x, centres: ops.cluster_labels(x, centres),
    ),
    "cluster_slots": (
        lambda b: (floats(b, 12, 4), torch.arange(5).expand(b, 5).clone(), torch.arange(12 * b).view(b, 12) % 5),
        lambda x, centres, labels: ops.cluster_slots(x, centres, labels, 4),
    ),
    "super_token_affinity": (
        lambda b: (floats(b, 35, 4),),
        lambda x: ops.super_token_affinity(x, 5, 7, 2, 3, 2, False),
    ),
    "super_token_pool": (
        lambda b: (floats(b, 35, 4), floats(b, 9, 6, 9).softmax(-1)),
        lambda x, affinity: ops.super_token_pool(x, affinity, 5, 7, 2, 3),
    ),
    "super_token_spread": (
        lambda b: (floats(b, 9, 4), floats(b, 9, 6, 9).softmax(-1)),
        lambda x, affinity: ops.super_token_spread(x, affinity, 5, 7, 2, 3),
    ),
    "mix_tokens": (
        lambda b: (floats(b, 12, 4), torch.arange(5 * b).view(b, 5) % 12, floats(b, 5, 12)),
        lambda x, source, weights: ops.mix_tokens(x, source, weights),
    ),
    "strided_tokens": (lambda b: (bools(b, 12),), lambda among: ops.strided_tokens(among, 3)),
    "nearest_tokens": (
        lambda b: (floats(b, 12, 4), torch.arange(5 * b).view(b, 5) % 12, bools(b, 12)),
        lambda keys, source, among: ops.nearest_tokens(keys, source, among),
    ),
    "merge_weights": (
        lambda b: (torch.arange(12 * b).view(b, 12) % 6 - 1, torch.arange(5 * b).view(b, 5) % 12),
        lambda assigned, source: ops.merge_weights(assigned, source, "sum"),
    ),
    "first_members": (
        lambda b: (torch.arange(12 * b).view(b, 12) % 7 - 1,),
        lambda assigned: ops.first_members(assigned, 6),
    ),
    "kmeans_assign": (lambda b: (floats(b, 12, 4),), lambda x: ops.kmeans_assign(x, 3, 4, 7)),
    "elbow": (lambda b: (floats(b, 12),), lambda distortion: ops.elbow(distortion, 3, 1)),
    "pool_matrix": (lambda b: (floats(b, 12, 4),), lambda like: ops.pool_matrix(like, 3, 4, 2, 3)),
}
WHOLE = {"farthest_mask"}
"""Ops that loop as often as a budget is large: a compiler does not look into them."""
each_op = pytest.mark.parametrize("name", sorted(CASES))


class Call(torch.nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.call = CASES[name][1]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.call(*tensors)


def calls(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@each_op
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_pre_dispatch_trace_keeps_one_node(name, mode):
    make, call = CASES[name]
    graph = make_fx(call, pre_dispatch=True, tracing_mode=mode)(*make(3)).graph
    assert calls(graph) == [f"tokred.{name}.default"]


@each_op
def test_an_export_with_a_symbolic_batch_keeps_one_node(name):
    tensors = CASES[name][0](3)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Call(name), tensors, dynamic_shapes={"tensors": tuple({0: batch} for _ in tensors)})
    assert calls(program.graph) == [f"tokred.{name}.default"]
    other = CASES[name][0](5)
    torch.testing.assert_close(program.module()(*other), CASES[name][1](*other), rtol=0, atol=0)
    lowered = calls(program.run_decompositions().graph)
    whole = [f"tokred.{name}.default"] if name in WHOLE else []
    assert lowered and [target for target in lowered if target.startswith("tokred")] == whole


@each_op
def test_the_lowered_graph_has_no_data_dependent_shape(name):
    make, call = CASES[name]
    graph = make_fx(call, tracing_mode="symbolic")(*make(3)).graph
    banned = ("nonzero", "_local_scalar_dense", "masked_select", "unique")
    assert not [target for target in calls(graph) if any(word in target for word in banned)]


@each_op
def test_fake_tensors_have_the_real_shape_and_dtype(name):
    make, call = CASES[name]
    real = call(*make(3))
    with FakeTensorMode() as mode:
        fake = call(*(mode.from_tensor(t) for t in make(3)))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@each_op
def test_inductor_gives_the_same_result_for_any_batch(name):
    make, call = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(Call(name), fullgraph=True)
    first = make(3)
    for tensor in first:
        torch._dynamo.mark_dynamic(tensor, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tensors in (first, make(6)):
            torch.testing.assert_close(compiled(*tensors), call(*tensors), rtol=1e-5, atol=1e-6)


@each_op
def test_the_schema_holds(name):
    make, call = CASES[name]
    graph = make_fx(call, pre_dispatch=True, tracing_mode="fake")(*make(3)).graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    values = dict(zip((n for n in graph.nodes if n.op == "placeholder"), make(3), strict=True))
    arguments = torch.fx.node.map_arg(node.args, lambda n: values[n])
    checks = ("test_schema", "test_faketensor")
    assert set(torch.library.opcheck(node.target, tuple(arguments), test_utils=checks).values()) == {"SUCCESS"}


@each_op
def test_rows_do_not_see_each_other(name):
    make, call = CASES[name]
    tensors = make(3)
    whole = call(*tensors)
    for b in range(3):
        own = whole[b : b + 1] if len(whole) > 1 else whole  # a matrix that rows share
        torch.testing.assert_close(own, call(*(t[b : b + 1] for t in tensors)), rtol=1e-6, atol=1e-6)


def test_symbolic_lengths():
    """The number of tokens and the budget may be symbols too."""

    def prune(x: torch.Tensor) -> torch.Tensor:
        budget = x.shape[1] // 3
        received = ops.attention_received(x[:, None], x[:, None], None, None, 0.5, False, 0.0, "mean", "mean")
        keep = ops.fill_mask([received > 2], received, None, budget)
        return ops.gather_tokens(x, ops.kept_indices(keep, budget), 1, 0)

    torch._dynamo.reset()
    compiled = torch.compile(prune, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, tokens in ((2, 12), (3, 31)):
            x = floats(batch, tokens, 4)
            torch._dynamo.mark_dynamic(x, [0, 1])
            torch.testing.assert_close(compiled(x), prune(x), rtol=0, atol=0)


def test_a_reload_keeps_the_ops_and_another_schema_is_refused():
    before = ops.topk_mask.default
    importlib.reload(_library)
    importlib.reload(sys.modules["tokcompile.kernels.topk_mask"])
    importlib.reload(kernels)
    assert ops.topk_mask.default is before
    assert ops.topk_mask(floats(1, 4), None, 2).sum() == 2
    with pytest.raises(ValueError, match="already defined"):
        kernels.define("topk_mask(Tensor scores) -> Tensor", lambda scores: scores)
    with pytest.raises(KeyError, match="no op tokred::median; known: .*topk_mask"):
        kernels.reference_of("median")


def test_every_op_is_tested_here():
    assert set(kernels.names()) == set(CASES)
