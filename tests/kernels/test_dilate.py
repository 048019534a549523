"""dilate: against a loop over marked tokens and offsets."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred
CROSS = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]


def dilate(mask, offsets, height, width, edges):
    return ops.dilate(mask, [dy for dy, _ in offsets], [dx for _, dx in offsets], height, width, edges)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["clamp_flat", "grid"]),
    st.lists(st.tuples(st.integers(-7, 7), st.integers(-7, 7)), max_size=6), st.data(),
)  # fmt: skip
def test_dilate_equals_the_loop(height, width, batch, edges, offsets, data):
    tokens = height * width
    mask = torch.tensor(
        data.draw(st.lists(st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=batch, max_size=batch))
    )
    got = dilate(mask, offsets, height, width, edges)
    assert torch.equal(got, oracles.dilated(mask, offsets, height, width, edges))


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 9), st.lists(st.integers(1, 5), min_size=1, max_size=3), st.sampled_from(["clamp_flat", "grid"]),
    st.lists(st.tuples(st.integers(-7, 7), st.integers(-7, 7)), max_size=6), st.data(),
)  # fmt: skip
def test_each_row_is_dilated_on_a_grid_of_its_own_width(tokens, widths, edges, offsets, data):
    mask = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=len(widths), max_size=len(widths)
            )
        )
    )
    ys, xs = [dy for dy, _ in offsets], [dx for _, dx in offsets]
    got = ops.dilate_by_width(mask, ys, xs, torch.tensor(widths), edges)
    for row, width in enumerate(widths):
        height = -(-tokens // width)  # the last row may be short
        whole = torch.zeros(1, height * width, dtype=torch.bool)
        whole[:, :tokens] = mask[row]
        want = oracles.dilated(whole[:, :tokens], offsets, height, width, edges, tokens)
        assert torch.equal(got[row : row + 1], want)


@pytest.mark.parametrize(
    "anchor, reached",
    [
        (300, {276, 299, 300, 301, 324}),
        (0, {0, 1, 24}),
        (575, {551, 574, 575}),
        (24, {0, 23, 24, 25, 48}),
    ],
)
def test_neighbours_of_the_hiprune_reference(anchor, reached):
    mask = torch.zeros(1, 576, dtype=torch.bool)
    mask[0, anchor] = True
    got = dilate(mask, CROSS, 24, 24, "clamp_flat")
    assert set(got[0].nonzero().flatten().tolist()) == reached


def test_the_grid_has_no_neighbour_across_an_edge():
    mask = torch.zeros(1, 576, dtype=torch.bool)
    mask[0, 24] = True
    assert set(dilate(mask, CROSS, 24, 24, "grid")[0].nonzero().flatten().tolist()) == {0, 24, 25, 48}


def test_bad_arguments_are_refused():
    mask = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="edges must be one of clamp_flat, grid"):
        dilate(mask, CROSS, 2, 2, "wrap")
    with pytest.raises(ValueError, match=r"\[B, 2\*3\]"):
        dilate(mask, CROSS, 2, 3, "grid")
    with pytest.raises(ValueError, match="1 offsets_y but 2 offsets_x"):
        ops.dilate(mask, [0], [0, 1], 2, 2, "grid")
    with pytest.raises(ValueError, match="edges must be one of clamp_flat, grid"):
        ops.dilate_by_width(mask, *zip(*CROSS, strict=True), torch.tensor([2]), "wrap")
    with pytest.raises(ValueError, match=r"width \[B\]"):
        ops.dilate_by_width(mask, *zip(*CROSS, strict=True), torch.tensor([2, 2]), "grid")
    with pytest.raises(ValueError, match="1 offsets_y but 2 offsets_x"):
        ops.dilate_by_width(mask, [0], [0, 1], torch.tensor([2]), "grid")
