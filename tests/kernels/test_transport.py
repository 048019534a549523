"""Optimal transport between tokens, and the choice of tokens window by window: against loops over pairs."""

from __future__ import annotations

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
seeds = st.integers(0, 2**31)


def cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float(one @ other / max(float(one.norm() * other.norm()), 1e-300))


def cost_by_loops(kept, gone, kept_at, gone_at, height, width, distance) -> Tensor:
    ys = [float(v) for v in torch.linspace(0, 1, height, dtype=torch.float64)]
    xs = [float(v) for v in torch.linspace(0, 1, width, dtype=torch.float64)]
    out = torch.zeros(len(kept), kept.shape[1], gone.shape[1], dtype=torch.float64)
    for b, k, m in torch.ones_like(out).nonzero().tolist():
        (y, x), (v, u) = divmod(int(kept_at[b, k]), width), divmod(int(gone_at[b, m]), width)
        out[b, k, m] = 1 - cosine(kept[b, k], gone[b, m]) + distance * math.hypot(ys[y] - ys[v], xs[x] - xs[u])
    return out


def plan_by_loops(cost: Tensor, temperature: float, iterations: int) -> Tensor:
    """The released code's loop on the kernel itself, in float64: r = u / K c, then c = v / K^T r."""
    out = torch.zeros_like(cost, dtype=torch.float64)
    for b, each in enumerate(cost.double()):
        kernel = (-each.T / temperature).exp()  # [M, n]
        rows, columns = kernel.shape
        c = torch.ones(columns, dtype=torch.float64)
        for _ in range(iterations):
            r = (1 / rows) / (kernel @ c)
            c = (1 / columns) / (kernel.T @ r)
        out[b] = (r[:, None] * kernel * c).T
    return out


def merged_by_loops(anchors: Tensor, dropped: Tensor, plan: Tensor, hard: float) -> Tensor:
    """Step 6 of the method on one frame: anchors [n, C], dropped [M, C], plan [M, n]; float64."""
    anchors, dropped = anchors.double(), dropped.double()
    out = torch.zeros_like(anchors)
    nearest = [max(range(len(anchors)), key=lambda k: (cosine(x, anchors[k]), -k)) for x in dropped]
    for k, anchor in enumerate(anchors):
        poured = sum(plan[m, k] * x for m, x in enumerate(dropped))
        soft = (anchor + poured) / (1 + float(plan[:, k].sum()))
        mine = [x for m, x in enumerate(dropped) if nearest[m] == k]
        whole = (anchor + sum(mine)) / (1 + len(mine))
        out[k] = (1 - hard) * soft + hard * whole
    return out


def frame(seed: int, batch: int, height: int, width: int, kept: int, channels: int = 6):
    """Features, a mask of anchors with as many in each row, and the places of anchors and of the others."""
    torch.manual_seed(seed)
    tokens = height * width
    x = torch.randn(batch, tokens, channels)
    keep = torch.zeros(batch, tokens, dtype=torch.bool)
    for row in keep:
        row[torch.randperm(tokens)[:kept]] = True
    places = [torch.stack([mask.nonzero().flatten() for mask in masks]) for masks in (keep, ~keep)]
    features = [torch.stack([x[b, at[b]] for b in range(batch)]) for at in places]
    return x, keep, features, places


def merge(x, keep, features, places, height, width, iterations=2, hard=0.1) -> tuple[Tensor, Tensor]:
    cost = ops.transport_cost(*features, *places, height, width, 0.5)
    plan = ops.transport_plan(cost, 0.1, iterations)
    weights = ops.transport_weights(plan, keep, None, "plan")
    nearest = ops.nearest_tokens(x, places[0], None)
    weights = (1 - hard) * weights + hard * ops.merge_weights(nearest, places[0], "average")
    return ops.mix_tokens(x, places[0], weights), plan


shapes = st.tuples(seeds, st.integers(1, 3), st.integers(1, 5), st.integers(2, 5)).flatmap(
    lambda s: st.tuples(st.just(s), st.integers(1, s[2] * s[3] - 1))
)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from([0.0, 0.5, 2.0]))
def test_the_cost_equals_the_loop(shape, distance):
    (seed, batch, height, width), kept = shape
    _, _, features, places = frame(seed, batch, height, width, kept)
    got = ops.transport_cost(*features, *places, height, width, distance)
    assert got.dtype == torch.float32
    want = cost_by_loops(*features, *places, height, width, distance)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 4))
def test_the_cost_over_time_equals_the_loop(shape, later):
    (seed, batch, height, width), kept = shape
    _, _, (keyframe, frame_), _ = frame(seed, batch, height, width, kept)
    got = ops.transport_cost_over_time(keyframe, frame_, float(later), 1.5)
    limit = 1 - 1e-6
    factor = 1 - math.exp(-(later**2) / (2 * 1.5**2 + 1e-9))
    for b in range(batch):
        apart = [[1 - min(max(cosine(y, s), -limit), limit) for s in frame_[b]] for y in keyframe[b]]
        least = min(min(row) for row in apart)
        want = torch.tensor([[(a - least) * factor for a in row] for row in apart], dtype=torch.float64)
        torch.testing.assert_close(got[b].double(), want, rtol=1e-4, atol=2e-6)
    assert (got.amin((1, 2)) == 0).all()


def test_factors_of_time_are_those_of_the_paper():
    kept, gone = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    # One token is orthogonal and one the same: the costs before the factor are 1 (less 1e-6) and 0.
    for later, factor in ((1, 0.19926), (2, 0.58889), (3, 0.86466)):
        got = ops.transport_cost_over_time(kept, gone, float(later), 1.5)
        torch.testing.assert_close(got, torch.tensor([[[factor, 0.0]]]), rtol=0, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(shapes, st.integers(1, 6), st.sampled_from([0.1, 0.5]))
def test_the_plan_equals_the_released_loop(shape, iterations, temperature):
    (seed, batch, height, width), kept = shape
    _, _, features, places = frame(seed, batch, height, width, kept)
    cost = ops.transport_cost(*features, *places, height, width, 0.5)
    got = ops.transport_plan(cost, temperature, iterations)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), plan_by_loops(cost, temperature, iterations), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("iterations", [1, 2, 100])
def test_shares_of_each_anchor_sum_to_one_nth(iterations):
    """At the method's own sizes, in whatever iteration it stops: the anchors' update is the last."""
    _, _, features, places = frame(1, 2, 27, 27, 126, channels=32)
    cost = ops.transport_cost(*features, *places, 27, 27, 0.5)
    total = ops.transport_plan(cost, 0.1, iterations).double().sum(2)
    assert (total - 1 / 126).abs().max() < 1e-6


def test_many_iterations_meet_both_marginals():
    _, _, features, places = frame(3, 2, 4, 5, 7)
    plan = ops.transport_plan(ops.transport_cost(*features, *places, 4, 5, 0.5), 0.5, 200)
    torch.testing.assert_close(plan.sum(1), torch.full((2, 13), 1 / 13), rtol=1e-4, atol=0)


def test_a_cost_that_underflows_in_half_precision_leaves_no_nan():
    """exp(-2.7 / 0.1) is 2e-12, below the smallest float16; a row of such costs divides zero by zero."""
    cost = torch.tensor([[[2.7, 0.1], [2.6, 0.2]]])
    assert ((-cost[..., 0] / 0.1).exp().half() == 0).all()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        plan = ops.transport_plan(cost.to(dtype), 0.1, 3)
        assert plan.isfinite().all()
        torch.testing.assert_close(plan.double(), plan_by_loops(cost.to(dtype), 0.1, 3), rtol=1e-4, atol=1e-9)
    assert ops.transport_plan(cost * 1000, 0.1, 3).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 4), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_merge_equals_the_loop(shape, iterations, hard):
    (seed, batch, height, width), kept = shape
    x, keep, features, places = frame(seed, batch, height, width, kept)
    got, plan = merge(x, keep, features, places, height, width, iterations, hard)
    for b in range(batch):
        want = merged_by_loops(features[0][b], features[1][b], plan[b].T.double(), hard)
        torch.testing.assert_close(got[b].double(), want, rtol=1e-4, atol=1e-5)


def test_an_anchor_moves_by_one_part_in_n_and_one():
    x, keep, features, places = frame(5, 2, 6, 6, 9)
    got, plan = merge(x, keep, features, places, 6, 6, hard=0.0)
    mean = 9 * plan @ features[1]
    torch.testing.assert_close(got, (9 * features[0] + mean) / 10, rtol=1e-5, atol=1e-6)


def test_identical_tokens_stay_as_they_are():
    """In both stages; exactly, up to the rounding of weights that sum to one."""
    _, keep, _, places = frame(7, 2, 5, 5, 6)
    token = torch.randn(6)
    x = token.expand(2, 25, 6)
    features = [token.expand(2, 6, 6), token.expand(2, 19, 6)]
    cost = ops.transport_cost(*features, *places, 5, 5, 0.5)
    grid = cost_by_loops(torch.ones(2, 6, 1), torch.ones(2, 19, 1), *places, 5, 5, 0.5)
    torch.testing.assert_close(cost.double(), grid, rtol=1e-5, atol=1e-6)  # geometry only
    got, _ = merge(x, keep, features, places, 5, 5)
    torch.testing.assert_close(got, token.expand(2, 6, 6), rtol=1e-6, atol=1e-6)
    plan = ops.transport_plan(ops.transport_cost_over_time(*features, 1.0, 1.5), 0.1, 2)
    torch.testing.assert_close(plan, torch.full_like(plan, 1 / (6 * 19)), rtol=1e-5, atol=0)
    weights = ops.transport_weights(plan, keep, None, "row")
    torch.testing.assert_close(weights @ x, token.expand(2, 6, 6), rtol=1e-6, atol=1e-6)


def test_one_dropped_token_goes_to_all_anchors_alike():
    x, keep, features, places = frame(11, 2, 3, 3, 8)
    got, plan = merge(x, keep, features, places, 3, 3)
    torch.testing.assert_close(plan, torch.full((2, 8, 1), 1 / 8), rtol=1e-6, atol=0)
    for b in range(2):
        want = merged_by_loops(features[0][b], features[1][b], torch.full((1, 8), 1 / 8), 0.1)
        torch.testing.assert_close(got[b].double(), want, rtol=1e-5, atol=1e-6)


def test_two_frames_equal_two_single_frames():
    x, keep, features, places = frame(13, 2, 4, 4, 5)
    both, _ = merge(x, keep, features, places, 4, 4)
    for b in (slice(0, 1), slice(1, 2)):
        one, _ = merge(x[b], keep[b], [f[b] for f in features], [p[b] for p in places], 4, 4)
        torch.testing.assert_close(both[b], one, rtol=1e-6, atol=1e-6)


def fit(plan: Tensor) -> Tensor:
    """How well a token fits the keyframe: the largest of its shares, scaled to sum to 1."""
    return (plan / plan.sum(1, keepdim=True)).amax(1)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 9), st.integers(2, 9), st.sampled_from([(1, 10), (3, 10), (2, 5), (1, 2), (9, 10)]))
def test_a_frame_is_merged_into_the_keyframe(seed, first, later, ratio):
    """Steps 9.2 to 9.5 by loops: the tokens that fit badly stay, the others go into the keyframe."""
    torch.manual_seed(seed)
    keyframe, tokens = torch.randn(1, first, 6), torch.randn(1, later, 6)
    plan = ops.transport_plan(ops.transport_cost_over_time(keyframe, tokens, 1.0, 1.5), 0.1, 2)
    fits = fit(plan)[0].double().tolist()
    if len(set(fits)) < later:
        return
    position = (later - 1) * ratio[0] / ratio[1]  # the quantile, interpolated as the released code has it
    ordered, low = sorted(fits), math.floor(position)
    tau = ordered[low] + (ordered[min(low + 1, later - 1)] - ordered[low]) * (position - low)
    stay = [i for i, q in enumerate(fits) if q < tau]
    count = -(-ratio[0] * (later - 1) // ratio[1])  # ceil(ratio * (m - 1)), in integers
    assert len(stay) == count
    mask = ops.topk_mask(-fit(plan), None, count)
    assert mask[0].nonzero().flatten().tolist() == stay
    keep = torch.tensor([[True] * first + [False] * later])
    among = torch.cat([torch.zeros(1, first, dtype=torch.bool), ~mask], 1)
    weights = ops.transport_weights(plan, keep, among, "row")
    got = weights @ torch.cat([keyframe, tokens], 1)
    shares = plan[0].double().T / plan[0].double().T.sum(1, keepdim=True)
    for k in range(first):
        poured = [(shares[i, k], tokens[0, i].double()) for i in range(later) if i not in stay]
        want = (keyframe[0, k].double() + sum(s * x for s, x in poured)) / (1 + sum(s for s, _ in poured))
        torch.testing.assert_close(got[0, k].double(), want, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(shapes, st.sampled_from(["plan", "row"]))
def test_weights_sum_to_one_and_an_anchor_gives_to_itself_alone(shape, normalise):
    (seed, batch, height, width), kept = shape
    _, keep, features, places = frame(seed, batch, height, width, kept)
    plan = ops.transport_plan(ops.transport_cost(*features, *places, height, width, 0.5), 0.1, 2)
    among = torch.rand(keep.shape) > 0.5
    weights = ops.transport_weights(plan, keep, among, normalise)
    torch.testing.assert_close(weights.sum(2), torch.ones(batch, kept), rtol=1e-6, atol=0)
    for b in range(batch):
        for k, t in enumerate(keep[b].nonzero().flatten().tolist()):
            column = weights[b, :, t]
            assert column[k] > 0 and (column.count_nonzero() == 1)
        assert (weights[b][:, ~keep[b] & ~among[b]] == 0).all()


def test_transport_has_gradients():
    torch.manual_seed(0)
    _, keep, (kept, gone), places = frame(17, 1, 3, 3, 4)
    kept.requires_grad_()
    plan = ops.transport_plan(ops.transport_cost(kept, gone, *places, 3, 3, 0.5), 0.1, 3)
    weights = ops.transport_weights(plan, keep, None, "plan")
    (grad,) = torch.autograd.grad(weights.square().sum(), kept)
    assert grad.isfinite().all() and grad.abs().max() > 0


# Anchors: the best of each window, then the best of all others.


@st.composite
def windowed(draw):
    rows, columns, high, wide = (draw(st.integers(1, 3)) for _ in range(4))
    values = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, 2.0]))
    tokens = rows * columns * high * wide
    scores = draw(st.lists(st.lists(values, min_size=tokens, max_size=tokens), min_size=1, max_size=2))
    return torch.tensor(scores), rows, columns, high, wide, draw(st.integers(0, high * wide))


@settings(max_examples=150, deadline=None)
@given(windowed())
def test_each_window_gives_its_best(case):
    scores, rows, columns, high, wide, k = case
    height, width = rows * high, columns * wide
    want = torch.zeros(scores.shape, dtype=torch.bool)
    for b, row in enumerate(scores.tolist()):
        for top in range(0, height, high):
            for left in range(0, width, wide):
                inside = [y * width + x for y in range(top, top + high) for x in range(left, left + wide)]
                best = oracles.ranked([row[i] for i in inside], [1] * len(inside))[:k]
                want[b, [inside[i] for i in best]] = True
    assert torch.equal(ops.window_topk_mask(scores, height, width, rows, columns, k), want)


def anchors(early: Tensor, deep: Tensor, budget: int) -> Tensor:
    """Half the budget by window, the rest of the frame by the deep layer's scores, as a rule has it."""
    local = budget // 2
    mask = ops.window_topk_mask(early, 27, 27, 3, 3, local // 9)
    return ops.fill_mask([mask], deep, None, local // 9 * 9 + budget - local)


@pytest.mark.parametrize(("budget", "count"), [(126, 126), (108, 108), (100, 95), (180, 180), (17, 9), (729, 725)])
def test_what_does_not_divide_among_windows_is_lost(budget, count):
    torch.manual_seed(budget)
    early, deep = torch.rand(2, 729), torch.rand(2, 729)
    got = anchors(early, deep, budget)
    assert (got.sum(1) == count).all()
    per_window = budget // 2 // 9
    for b in range(2):
        local = set()
        for y in range(3):
            for x in range(3):
                inside = [(9 * y + i) * 27 + 9 * x + j for i in range(9) for j in range(9)]
                local |= set(sorted(inside, key=lambda t: -float(early[b, t]))[:per_window])
        rest = [0.0 if t in local else float(v) for t, v in enumerate(deep[b])]
        world = sorted(range(729), key=lambda t: -rest[t])[: budget - budget // 2]
        assert set(got[b].nonzero().flatten().tolist()) == local | set(world)


def test_half_precision_chooses_as_single_precision_where_scores_are_apart():
    """Scores whose gaps exceed 2^-7 of their size keep their order in bfloat16."""
    torch.manual_seed(0)
    ladder = 1.01 ** torch.arange(729.0)
    early, deep = (ladder[torch.randperm(729)][None] for _ in range(2))
    assert torch.equal(anchors(early, deep, 126), anchors(early.bfloat16(), deep.bfloat16(), 126))


def test_wrong_arguments_are_refused():
    x = torch.zeros(1, 4, 3)
    at = torch.zeros(1, 4, dtype=torch.int64)
    keep = torch.ones(1, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="do not divide a grid of 4 x 4"):
        ops.window_topk_mask(torch.zeros(1, 16), 4, 4, 3, 3, 1)
    with pytest.raises(ValueError, match="scores must be"):
        ops.window_topk_mask(torch.zeros(1, 15), 4, 4, 2, 2, 1)
    with pytest.raises(RuntimeError, match="cannot select k=5 of 4"):
        ops.window_topk_mask(torch.zeros(1, 16), 4, 4, 2, 2, 5)
    with pytest.raises(ValueError, match="kept must be"):
        ops.transport_cost_over_time(x, torch.zeros(1, 4, 2), 1.0, 1.5)
    with pytest.raises(ValueError, match="places"):
        ops.transport_cost(x, x, at[:, :2], at, 2, 2, 0.5)
    with pytest.raises(ValueError, match="at least one row"):
        ops.transport_cost(x, x, at, at, 0, 2, 0.5)
    with pytest.raises(ValueError, match="temperature 0"):
        ops.transport_plan(x, 0.0, 1)
    with pytest.raises(ValueError, match="iterations 0"):
        ops.transport_plan(x, 0.1, 0)
    with pytest.raises(ValueError, match="normalise must be one of plan, row"):
        ops.transport_weights(x, keep, None, "column")
    with pytest.raises(ValueError, match="keep bool"):
        ops.transport_weights(x, keep.long(), None, "plan")
