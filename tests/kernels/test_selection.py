"""topk_mask, fill_mask, kept_indices: against sorting in Python."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokcompile.kernels  # noqa: F401
from tokcompile.kernels._order import by_ranks

ops = torch.ops.tokred
# Few distinct values, so that most rows have ties; the specials sit where float keys would swallow or reorder them.
VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.0 + 2**-23, 1e-40, -1e-40, 3e38, float("inf"), -float("inf"), float("nan")]
)


KEYS = [pytest.param(nullcontext, id="bits"), pytest.param(by_ranks, id="ranks")]
"""Integers that tokens are ordered by: those of lowered graphs, and those of exported ones."""


@st.composite
def rows(draw, groups: int = 0):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    flat = batch * tokens
    scores = torch.tensor(draw(st.lists(VALUES, min_size=flat, max_size=flat))).view(batch, tokens)
    masks = [
        torch.tensor(draw(st.lists(st.booleans(), min_size=flat, max_size=flat))).view(batch, tokens)
        for _ in range(groups + 1)
    ]
    among = draw(st.sampled_from([None, masks[0]]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    return scores.to(dtype), masks[1:], among, draw(st.integers(0, tokens))


@pytest.mark.parametrize("keys", KEYS)
@settings(max_examples=150, deadline=None)
@given(case=rows())
def test_topk_mask_is_a_sort_cut_at_k(keys: Callable[[], AbstractContextManager], case):
    scores, _, among, k = case
    with keys():
        keep = ops.topk_mask(scores, among, k)
    assert torch.equal(keep, oracles.fill([], scores, among, k))
    assert keep.sum(1).tolist() == [k] * scores.shape[0]


@pytest.mark.parametrize("keys", KEYS)
@settings(max_examples=150, deadline=None)
@given(case=rows(groups=3))
def test_fill_mask_is_a_sort_by_group_then_score(keys: Callable[[], AbstractContextManager], case):
    scores, groups, among, k = case
    for first in (groups, groups[:1], []):
        with keys():
            keep = ops.fill_mask(first, scores, among, k)
        assert torch.equal(keep, oracles.fill(first, scores, among, k))


def test_fill_mask_keeps_differences_that_a_large_float_offset_would_swallow():
    scores = torch.tensor([[1.0, 1.0 + 2**-23, 0.5, 1.0]])
    first = torch.tensor([[True, True, False, True]])
    assert ops.fill_mask([first], scores, None, 1).tolist() == [[False, True, False, False]]
    assert ops.fill_mask([first], scores, None, 2).tolist() == [[True, True, False, False]]


def test_a_group_is_not_limited_by_among():
    keep = ops.fill_mask(
        [torch.tensor([[False, False, True]])], torch.tensor([[3.0, 2, 1]]), torch.tensor([[False, True, False]]), 2
    )
    assert keep.tolist() == [[False, True, True]]


@pytest.mark.parametrize("k", [-1, 5])
def test_impossible_budgets_are_refused(k):
    with pytest.raises(RuntimeError, match=f"k={k}"):
        ops.topk_mask(torch.zeros(1, 4), None, k)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="scores must be"):
        ops.topk_mask(torch.zeros(4), None, 1)
    with pytest.raises(ValueError, match="token mask must be bool"):
        ops.fill_mask([torch.ones(1, 4)], torch.zeros(1, 4), None, 1)
    with pytest.raises(ValueError, match="keep must be bool"):
        ops.kept_indices(torch.ones(1, 4), 4)
    with pytest.raises(ValueError, match="at most 126 priority groups"):
        ops.fill_mask([torch.zeros(1, 4, dtype=torch.bool)] * 127, torch.zeros(1, 4), None, 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 20), st.data())
def test_kept_indices_are_the_ascending_positions(batch, tokens, data):
    keep = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch))
    )
    length = data.draw(st.integers(0, tokens + 3))
    got = ops.kept_indices(keep, length)
    assert got.dtype == torch.int64 and got.is_contiguous()
    for row, mask in zip(got.tolist(), keep, strict=True):
        exact = mask.nonzero().flatten().tolist()
        assert row == (exact + [(exact or [0])[-1]] * length)[:length]


@pytest.mark.parametrize("budget", [64, 128, 160, 192])
def test_static_selection_equals_the_procedural_hiprune(budget):
    """Anchors, their clamped neighbours, then the deep layer's best."""
    generator = torch.Generator().manual_seed(budget)
    shallow, deep = torch.rand(8, 576, generator=generator), torch.rand(8, 576, generator=generator)
    anchors = round(budget * 0.1 / 5)
    cross = [0, 0, 0, -1, 1], [0, -1, 1, 0, 0]
    must = ops.dilate(ops.topk_mask(shallow, None, anchors), *cross, 24, 24, "clamp_flat")
    kept = ops.kept_indices(ops.fill_mask([must], deep, None, budget), budget)
    for b in range(8):
        top = shallow[b].topk(anchors).indices
        near = torch.cat([(top + d).clamp(0, 575) for d in (0, -1, 1, -24, 24)]).unique()
        lowered = deep[b].clone()
        lowered[near] -= 1
        rest = lowered.topk(budget - len(near)).indices
        assert kept[b].tolist() == torch.cat([near, rest]).sort().values.tolist()
