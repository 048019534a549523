"""Clusters around density peaks, and the table of their members: against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from clustering_naive import labels_by_loops, peaks_by_loops, slots_by_loops
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
seeds = st.integers(0, 2**31)


@st.composite
def features(draw):
    """Integers, so that distances are exact and often equal, or reals, where they hardly ever are."""
    torch.manual_seed(draw(seeds))
    batch, tokens, channels = draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.sampled_from([1, 4, 16]))
    clusters = draw(st.integers(1, tokens))
    if draw(st.booleans()):
        return torch.randint(-1, 2, (batch, tokens, channels)).float(), clusters, True
    return torch.randn(batch, tokens, channels), clusters, False


@settings(max_examples=100, deadline=None)
@given(features(), st.integers(1, 6))
def test_density_peaks_equal_the_loop(case, neighbours):
    x, clusters, exact = case
    got = ops.density_peaks(x, clusters, neighbours)
    assert got.shape == (len(x), clusters) and got.dtype == torch.int64
    for b, row in enumerate(x):
        want, gap = peaks_by_loops(row, clusters, neighbours)
        assume(exact or gap > 1e-6)  # where scores differ by rounding alone the order of sums decides
        assert got[b].tolist() == want


@settings(max_examples=100, deadline=None)
@given(features(), st.integers(1, 9))
def test_labels_and_slots_equal_the_loop(case, slots):
    x, clusters, _ = case
    centres = torch.stack([torch.randperm(x.shape[1])[:clusters] for _ in x])
    labels = ops.cluster_labels(x, centres)
    table = ops.cluster_slots(x, centres, labels, slots)
    assert labels.dtype == table.dtype == torch.int64 and table.shape == (len(x), clusters, slots)
    for b, row in enumerate(x):
        want = labels_by_loops(row, centres[b].tolist())
        assert labels[b].tolist() == want
        assert table[b].tolist() == slots_by_loops(row, centres[b].tolist(), want, slots)


def test_identical_tokens_make_the_same_clusters_whatever_the_batch():
    """All distances and so all scores are 0: the lowest index decides each time."""
    x = torch.full((1, 576, 48), 0.3)
    centres = ops.density_peaks(x, 260, 5)
    assert centres[0].tolist() == list(range(260))
    labels = ops.cluster_labels(x, centres)[0].tolist()
    assert labels == [*range(260), *[0] * 316]
    assert torch.equal(ops.density_peaks(x.expand(3, -1, -1), 260, 5), centres.expand(3, -1))


def test_half_precision_is_clustered_in_single_precision():
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16).bfloat16()
    centres = ops.density_peaks(x, 18, 5)
    assert torch.equal(centres, ops.density_peaks(x.float(), 18, 5))
    assert torch.equal(ops.cluster_labels(x, centres), ops.cluster_labels(x.float(), centres))


def test_a_batch_of_two_equals_two_of_one():
    torch.manual_seed(0)
    x = torch.randn(2, 40, 16)
    both = ops.density_peaks(x, 18, 5)
    assert torch.equal(both, torch.cat([ops.density_peaks(row[None], 18, 5) for row in x]))


def test_as_many_clusters_as_tokens_are_the_tokens_themselves():
    torch.manual_seed(0)
    x = torch.randn(2, 12, 8)
    centres = ops.density_peaks(x, 12, 5)
    assert (centres.sort(1).values == torch.arange(12)).all()
    labels = ops.cluster_labels(x, centres)
    table = ops.cluster_slots(x, centres, labels, 8)
    assert torch.equal(table, centres.unsqueeze(2).expand(2, 12, 8))


@pytest.mark.parametrize(
    ("members", "listed"),
    [(3, [0, 1, 2, 0, 1, 2, 0, 1]), (10, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [0] * 8), (8, list(range(8)))],
)
def test_slots_repeat_few_members_and_take_the_nearest_of_many(members, listed):
    """Members of a cluster on a line, the nearest to the centre last; a token of another cluster between them."""
    x = torch.cat([torch.arange(float(members)).flip(0), torch.tensor([100.0])])[None, :, None]
    centres = torch.tensor([[members - 1, members]])
    labels = torch.tensor([[0] * members + [1]])
    got = ops.cluster_slots(x, centres, labels, 8)
    assert got[0, 0].tolist() == [members - 1 - i for i in listed]
    assert got[0, 1].tolist() == [members] * 8


def test_members_at_one_distance_stand_by_index():
    x = torch.tensor([[[1.0], [-1.0], [0.0], [1.0], [-1.0]]])
    labels = torch.zeros(1, 5, dtype=torch.int64)
    assert ops.cluster_slots(x, torch.tensor([[2]]), labels, 7).tolist() == [[[2, 0, 1, 3, 4, 2, 0]]]


def test_a_cluster_without_members_lists_its_centre():
    x = torch.tensor([[[0.0], [0.0], [5.0]]])
    labels = torch.tensor([[0, 0, 2]])
    assert ops.cluster_slots(x, torch.tensor([[0, 1, 2]]), labels, 2).tolist() == [[[0, 1], [1, 1], [2, 2]]]


def test_wrong_arguments_are_refused():
    x, one = torch.zeros(1, 4, 3), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="x must be"):
        ops.density_peaks(x[0], 1, 5)
    with pytest.raises(ValueError, match="neighbours at least 1"):
        ops.density_peaks(x, 1, 0)
    for clusters, message in ((0, "at least 1"), (5, "of 4 tokens")):
        with pytest.raises(RuntimeError, match=message):
            ops.density_peaks(x, clusters, 5)
    with pytest.raises(ValueError, match="centres"):
        ops.cluster_labels(x, one[0])
    with pytest.raises(ValueError, match="labels"):
        ops.cluster_slots(x, one, one, 2)
    with pytest.raises(ValueError, match="at least one slot"):
        ops.cluster_slots(x, one, torch.zeros(1, 4, dtype=torch.int64), 0)
