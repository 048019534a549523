"""The ops that merge tokens: against loops over rows, slots and tokens."""

from __future__ import annotations

import math

import merging_naive
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
HALF = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def groups(draw, least: int = 1):
    """bool [B, T], and a count that no row has less than."""
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(least, 14))
    count = draw(st.integers(least, tokens))
    rows = []
    for _ in range(batch):
        size = draw(st.integers(count, tokens))
        chosen = draw(st.permutations(range(tokens)))[:size]
        rows.append([i in chosen for i in range(tokens)])
    return torch.tensor(rows), count


def strided(among: list[bool], count: int) -> list[int]:
    remaining = [i for i, inside in enumerate(among) if inside]
    return remaining[:: max(1, len(remaining) // count)][:count]


@settings(max_examples=150, deadline=None)
@given(groups())
def test_strided_tokens_are_every_nth_of_the_group(case):
    among, count = case
    got = ops.strided_tokens(among, count)
    assert got.tolist() == [strided(row, count) for row in among.tolist()]


def test_strided_tokens_of_the_paper():
    """523 left of 577 make steps of 52; one target is the first token."""
    among = torch.ones(1, 577, dtype=torch.bool)
    among[0, [0, *range(100, 153)]] = False
    left = among[0].nonzero().flatten()
    assert len(left) == 523
    assert ops.strided_tokens(among, 10)[0].tolist() == left[list(range(0, 469, 52))].tolist()
    assert ops.strided_tokens(among, 1).tolist() == [[1]]


def nearest(keys: Tensor, source: list[int], among: list[bool]) -> list[int]:
    unit = keys.float() / keys.float().norm(dim=1, keepdim=True).clamp(min=1e-30)
    out = []
    for i in range(len(keys)):
        likeness = [float(unit[i].double() @ unit[s].double()) for s in source]
        best = max(range(len(source)), key=lambda s, likeness=likeness: (likeness[s], -s))
        out.append((source.index(i) if i in source else best) if among[i] else -1)
    return out


@settings(max_examples=100, deadline=None)
@given(groups(), st.integers(0, 2**31), HALF)
def test_nearest_tokens_equal_a_loop(case, seed, dtype):
    among, count = case
    keys = random(*among.shape, 6, seed=seed).to(dtype)
    source = ops.strided_tokens(among, count)
    got = ops.nearest_tokens(keys, source, among)
    assert got.dtype == torch.int64
    assert got.tolist() == [nearest(k, s, a) for k, s, a in zip(keys, source.tolist(), among.tolist(), strict=True)]
    everything = torch.ones_like(among)
    assert torch.equal(ops.nearest_tokens(keys, source, None), ops.nearest_tokens(keys, source, everything))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "count", "width"), [(523, 10, 64), (97, 30, 7), (576, 33, 128), (16, 3, 5)])
def test_equal_tokens_join_the_first_source(tokens, count, width, dtype):
    """A matrix product may not round one of its columns otherwise than another."""
    keys = random(1, 1, width).expand(2, tokens, width).to(dtype)
    source = ops.strided_tokens(torch.ones(2, tokens, dtype=torch.bool), count)
    got = ops.nearest_tokens(keys, source, None)
    expected = [source[0].tolist().index(i) if i in source[0].tolist() else 0 for i in range(tokens)]
    assert got.tolist() == [expected, expected]


def test_nearest_tokens_of_zero_and_nan_keys():
    keys = torch.tensor([[[1.0, 0], [0, 0], [torch.nan, 1], [-1, -1], [0, 1], [1e-30, 1e-30], [3e38, 3e38]]])
    got = ops.nearest_tokens(keys, torch.tensor([[3, 4, 0]]), None)
    # The zero token is as much like one as like another; so is one of NaN, and neither is an error.
    assert got[0, [1, 2, 3, 4, 0]].tolist() == [0, 0, 0, 1, 2]
    assert got[0, 5].item() == got[0, 6].item() == 1


def merged(x: Tensor, assigned: list[int], source: list[int], mode: str) -> list[Tensor]:
    """Plain sums in float64."""
    out = []
    for slot, target in enumerate(source):
        members = [i for i, s in enumerate(assigned) if s == slot and (mode == "average" or i != target)]
        mean = sum((x[i].double() for i in members), torch.zeros(x.shape[1], dtype=torch.float64))
        mean = mean / max(len(members), 1)
        out.append(mean if mode == "average" else x[target].double() + mean)
    return out


@settings(max_examples=100, deadline=None)
@given(groups(), st.integers(0, 2**31), st.sampled_from(["average", "sum"]), HALF)
def test_merged_tokens_equal_a_loop(case, seed, mode, dtype):
    among, count = case
    x = random(*among.shape, 5, seed=seed).to(dtype)
    source = ops.strided_tokens(among, count)
    assigned = ops.nearest_tokens(x, source, among)
    weights = ops.merge_weights(assigned, source, mode)
    got = ops.mix_tokens(x, source, weights)
    want = [torch.stack(merged(x[b], assigned[b].tolist(), source[b].tolist(), mode)) for b in range(len(x))]
    assert got.dtype == dtype and weights.dtype == torch.float32
    rounding = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(got.double(), torch.stack(want), rtol=rounding, atol=rounding)


def test_a_slot_without_tokens():
    assigned, source = torch.tensor([[2, 0, -1, 0]]), torch.tensor([[1, 2, 0]])
    average = ops.merge_weights(assigned, source, "average")
    assert average.tolist() == [[[0, 0.5, 0, 0.5], [0, 0, 0, 0], [1, 0, 0, 0]]]
    # A source is in its sum even where it is in no slot; one alone is itself, not its double.
    total = ops.merge_weights(assigned, source, "sum")
    assert total.tolist() == [[[0, 1, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0]]]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.integers(0, 2**31), HALF)
def test_mix_tokens_equals_a_loop(batch, tokens, count, shared, seed, dtype):
    x = random(batch, tokens, 3, seed=seed).to(dtype)
    weights = random(1 if shared else batch, count, tokens, seed=seed + 1)
    got = ops.mix_tokens(x, torch.zeros(batch, count, dtype=torch.int64), weights)
    assert got.dtype == dtype and got.shape == (batch, count, 3)
    for b in range(batch):
        row = weights[0 if shared else b].double()
        for i in range(count):
            want = sum(float(row[i, t]) * x[b, t].double() for t in range(tokens))
            torch.testing.assert_close(
                got[b, i].double(), want, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2
            )


def test_mix_tokens_adds_half_types_up_in_float32():
    x = torch.ones(1, 4096, 1, dtype=torch.bfloat16)
    got = ops.mix_tokens(x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 4096))
    assert got.item() == 4096  # sums in bfloat16 stop at 256


@pytest.mark.parametrize("shared", [False, True])
def test_mix_tokens_has_gradients_for_content_and_weights(shared):
    x = random(2, 5, 3).double().requires_grad_()
    weights = random(1 if shared else 2, 4, 5).double().requires_grad_()
    source = torch.zeros(2, 4, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda v, w: ops.mix_tokens(v, source, w), (x, weights))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-1, 5), min_size=7, max_size=7), min_size=1, max_size=3))
def test_first_members_are_no_two_alike(rows):
    got = ops.first_members(torch.tensor(rows), 6)
    for row, chosen in zip(rows, got.tolist(), strict=True):
        firsts = [row.index(s) for s in range(6) if s in row]
        spare = iter(i for i in range(7) if i not in firsts)
        assert chosen == [row.index(s) if s in row else next(spare) for s in range(6)]


def zipped(x: Tensor, received: Tensor, keys: Tensor, dominant: int, contextual: int, mode: str) -> Tensor:
    """The class token, the best patches and the contextual tokens of x [B, 1 + P, C], by the ops."""
    patches = F.pad(ops.topk_mask(received, None, dominant - 1), (1, 0))
    kept = F.pad(patches[:, 1:], (1, 0), value=True)
    source = ops.strided_tokens(~kept, contextual)
    assigned = ops.nearest_tokens(F.pad(keys, (0, 0, 1, 0)), source, ~kept)
    merged = ops.mix_tokens(x, source, ops.merge_weights(assigned, source, mode))
    return torch.cat([ops.gather_tokens(x, ops.kept_indices(kept, dominant), 1, 0), merged], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dominant", "contextual"), [(54, 10), (191, 30), (20, 1)])
@pytest.mark.parametrize("mode", ["sum", "average"])
def test_dominant_and_contextual_tokens_equal_the_procedure(dominant, contextual, mode, dtype):
    """64 tokens of 577, in a batch as alone."""
    x, keys = random(2, 577, 24).to(dtype), random(2, 576, 16, seed=1).to(dtype)
    received = random(2, 576, seed=2).exp()
    got = zipped(x, received, keys, dominant, contextual, mode)
    assert got.shape == (2, dominant + contextual, 24) and got.dtype == dtype
    made = [merging_naive.zipped_row(r, k, 1, dominant, contextual, mode) for r, k in zip(received, keys, strict=True)]
    torch.testing.assert_close(got, merging_naive.mixed(x, [rows for rows, _ in made]))
    for b in range(2):
        alone = zipped(x[b : b + 1], received[b : b + 1], keys[b : b + 1], dominant, contextual, mode)
        torch.testing.assert_close(got[b : b + 1], alone)


def test_patches_that_are_all_alike():
    """The first 53 patches are dominant, and all others join the first target, whose sum is the double."""
    x = random(1, 1, 24).expand(1, 577, 24).contiguous()
    got = zipped(x, torch.ones(1, 576), x[:, 1:], 54, 10, "sum")
    want = torch.cat([x[:, :54], 2 * x[:, :1], x[:, :9]], 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Adaptive pooling.

SIZES = [(27, 8), (27, 12), (27, 16), (32, 12), (24, 12)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_pooling_equals_adaptive_pooling(size, out, dtype, tolerance):
    x = random(4, size * size, 5, seed=size).to(dtype)
    _pools(x, (size, size), (out, out), tolerance)


def _pools(x: Tensor, size: tuple[int, int], out: tuple[int, int], tolerance: float) -> None:
    weights = ops.pool_matrix(x, *size, *out)
    assert weights.shape == (1, math.prod(out), math.prod(size))
    torch.testing.assert_close(weights.sum(2), torch.ones(1, math.prod(out)), rtol=0, atol=1e-6)
    got = ops.mix_tokens(x, torch.zeros(len(x), math.prod(out), dtype=torch.int64), weights)
    want = F.adaptive_avg_pool2d(x.float().transpose(1, 2).unflatten(2, size), out).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got.float(), want, rtol=tolerance, atol=tolerance)
    for b in range(len(x)):
        alone = ops.mix_tokens(x[b : b + 1], torch.zeros(1, math.prod(out), dtype=torch.int64), weights)
        torch.testing.assert_close(alone[0], got[b], rtol=1e-6, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(*[st.integers(1, 13)] * 2, *[st.integers(1, 16)] * 2)
def test_pooling_of_grids_that_are_no_squares(height, width, out_height, out_width):
    _pools(random(2, height * width, 3, seed=height), (height, width), (out_height, out_width), 1e-6)


@pytest.mark.parametrize("size", [(27, 27), (5, 9)])
def test_pooling_to_itself_to_one_and_of_a_constant(size):
    count = math.prod(size)
    assert torch.equal(ops.pool_matrix(torch.empty(1), *size, *size)[0], torch.eye(count))
    torch.testing.assert_close(
        ops.pool_matrix(torch.empty(1), *size, 1, 1), torch.full((1, 1, count), 1 / count), rtol=1e-6, atol=0
    )
    x = torch.full((1, count, 2), 3.0)
    got = ops.mix_tokens(x, torch.zeros(1, 56, dtype=torch.int64), ops.pool_matrix(x, *size, 7, 8))
    torch.testing.assert_close(got, torch.full((1, 56, 2), 3.0), rtol=1e-6, atol=0)


def test_pooling_by_halves_is_the_mean_of_squares():
    x = random(1, 576, 4)
    got = ops.mix_tokens(x, torch.zeros(1, 144, dtype=torch.int64), ops.pool_matrix(x, 24, 24, 12, 12))
    want = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (24, 24)), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_pooling_has_the_gradient_of_a_mean():
    x = random(2, 15, 3).double().requires_grad_()
    weights = ops.pool_matrix(x, 5, 3, 2, 2)
    source = torch.zeros(2, 4, dtype=torch.int64)
    assert torch.autograd.gradcheck(lambda v: ops.mix_tokens(v, source, weights), (x,))


# Clusters.


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 12), st.data(), st.integers(0, 2**31), HALF)
def test_kmeans_equals_a_loop(batch, tokens, data, seed, dtype):
    k, iterations = data.draw(st.integers(1, tokens)), data.draw(st.integers(1, 6))
    x = random(batch, tokens, 6, seed=seed).to(dtype)
    got = ops.kmeans_assign(x, k, iterations, seed)
    assert got.dtype == torch.int64
    assert got.tolist() == [merging_naive.clusters(row.float(), k, iterations, seed) for row in x]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [4, 12, 32])
def test_kmeans_finds_what_was_planted(k, seed):
    """In two rows of their own, whatever the sizes of the tokens."""
    truth = torch.stack(
        [torch.randperm(k, generator=torch.Generator().manual_seed(seed + b)).repeat(6) for b in (0, 1)]
    )
    directions = F.one_hot(torch.arange(k), 40).float()
    x = directions[truth] + random(2, 6 * k, 40, seed=seed) * 1e-3
    labels = ops.kmeans_assign(x, k, 10, seed)
    for row, planted in zip(labels.tolist(), truth.tolist(), strict=True):
        assert len(set(zip(row, planted, strict=True))) == k == len(set(row))
    sizes = random(2, 6 * k, 1, seed=seed).exp()
    assert torch.equal(ops.kmeans_assign(x * sizes, k, 10, seed), labels)
    assert torch.equal(ops.kmeans_assign(x[1:], k, 10, seed), labels[1:])
    source = ops.first_members(labels, k)
    means = ops.mix_tokens(F.normalize(x, dim=2), source, ops.merge_weights(labels, source, "average"))
    torch.testing.assert_close(means, directions[truth.gather(1, source)], rtol=0, atol=2e-3)


def test_as_many_clusters_as_tokens_and_one_cluster():
    x = random(2, 20, 8)
    every = ops.kmeans_assign(x, 20, 3, 0)
    assert every.sort(1).values.tolist() == [list(range(20))] * 2
    assert (ops.kmeans_assign(x, 1, 3, 0) == 0).all()


@pytest.mark.parametrize("seed", range(4))
def test_a_zero_token_has_label_0_and_harms_nobody(seed):
    x = random(2, 9, 4, seed=seed)
    x[0, 3] = 0
    labels = ops.kmeans_assign(x, 4, 5, seed)
    assert labels[0, 3] == 0 and labels.min() >= 0 and labels.max() < 4
    assert (ops.kmeans_assign(torch.zeros(1, 5, 3), 2, 3, seed) == 0).all()


@pytest.mark.parametrize("width", [7, 64])
@pytest.mark.parametrize("tokens", [5, 30])
def test_equal_tokens_are_one_cluster_and_the_others_stay_empty(tokens, width):
    x = random(1, 1, width).expand(2, tokens, width)
    assert (ops.kmeans_assign(x, 5, 10, 1) == 0).all()


def test_labels_are_a_map_of_the_grid_to_codes():
    """Each cell of a video's grid is its centroid."""
    frames, side, k = 3, 5, 6
    x = random(2, frames * side * side, 8)
    labels = ops.kmeans_assign(x, k, 10, 0)
    codes = ops.mix_tokens(x, ops.first_members(labels, k), ops.merge_weights(labels, labels[:, :k], "average"))
    cells = ops.gather_tokens(codes, labels, 1, 0).view(2, frames, side, side, 8)
    for b, f, h, w in [(0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 4, 4)]:
        members = [i for i, label in enumerate(labels[b]) if label == labels[b, (f * side + h) * side + w]]
        torch.testing.assert_close(cells[b, f, h, w], x[b, members].mean(0), rtol=1e-5, atol=1e-6)


def test_seeds_draw_other_tokens():
    x = random(1, 40, 8)
    drawn = {tuple(ops.kmeans_assign(x, 5, 1, seed)[0].tolist()) for seed in range(8)}
    assert len(drawn) > 4
    assert torch.equal(ops.kmeans_assign(x, 5, 9, 3), ops.kmeans_assign(x, 5, 9, 3))


def test_the_elbow_of_a_smooth_curve_is_the_least_number():
    """1000 / K for K of 12 to 32."""
    curve = torch.tensor([[1000 / k for k in range(12, 33)]])
    assert ops.elbow(curve, 12, 4).tolist() == [12]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=3, max_size=20), st.integers(1, 15), st.integers(0, 5))
def test_the_elbow_is_the_largest_second_difference(values, first, offset):
    bends = [values[i] - 2 * values[i + 1] + values[i + 2] for i in range(len(values) - 2)]
    assert ops.elbow(torch.tensor([values]), first, offset).item() == max(bends.index(max(bends)) + offset, first)


def test_what_makes_no_sense_is_refused():
    x, source = torch.zeros(1, 4, 3), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="x must be"):
        ops.mix_tokens(x[0], source, torch.zeros(1, 2, 4))
    for weights in (torch.zeros(1, 2, 5), torch.zeros(1, 3, 4)):
        with pytest.raises(ValueError, match="do not lead from 4 tokens to 2"):
            ops.mix_tokens(x, source, weights)
    with pytest.raises(ValueError, match="among must be bool"):
        ops.strided_tokens(torch.ones(1, 4), 2)
    with pytest.raises(ValueError, match="cannot space 0 tokens"):
        ops.strided_tokens(torch.ones(1, 4, dtype=torch.bool), 0)
    with pytest.raises(ValueError, match="keys must be"):
        ops.nearest_tokens(x[0], source, None)
    with pytest.raises(ValueError, match="among must be bool"):
        ops.nearest_tokens(x, source, torch.zeros(1, 4))
    with pytest.raises(ValueError, match="assigned must be"):
        ops.merge_weights(source[0], source, "sum")
    with pytest.raises(ValueError, match="average, sum, not 'median'"):
        ops.merge_weights(source, source, "median")
    with pytest.raises(ValueError, match="assigned must be"):
        ops.first_members(source[0], 2)
    with pytest.raises(ValueError, match="3 slots of 2 tokens"):
        ops.first_members(source, 3)
    with pytest.raises(ValueError, match="cannot pool a grid of 2 x 0"):
        ops.pool_matrix(x, 2, 0, 1, 1)
    with pytest.raises(ValueError, match="x must be"):
        ops.kmeans_assign(x[0], 2, 1, 0)
    for k, iterations in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            ops.kmeans_assign(x, k, iterations, 0)
    with pytest.raises(ValueError, match="cannot make 5 clusters of 4"):
        ops.kmeans_assign(x, 5, 1, 0)
    with pytest.raises(ValueError, match="3 or more"):
        ops.elbow(torch.zeros(1, 2), 1, 1)
