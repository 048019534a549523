"""Operators that merge keys of caches: against loops over rows, heads and tokens, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from drawn import made, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


def candidates(real: Tensor | None, among: Tensor | None, row: int, tokens: int, first: int, last: int) -> list[int]:
    places = [j for j in range(tokens) if real is None or real[row, j]]
    inside = places[first : max(len(places) - last, 0)]
    return [j for j in inside if among is None or among[row, j]]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 9),
    last=st.integers(0, 4),
    align=st.booleans(),
    how=st.sampled_from(["max", "sum"]),
    padding=st.booleans(),
    count=st.integers(1, 3),
)
def test_join_key_scores(seed: int, tokens: int, last: int, align: bool, how: str, padding: bool, count: int) -> None:
    scores = [made(seed + i, 2, 3, tokens).abs() * (i + 1) for i in range(count)]
    real = padded(seed, 2, tokens) if padding else None
    got = ops.join_key_scores(scores, real, last, align, how)
    for row in range(2):
        up = candidates(real, None, row, tokens, 0, last)
        for head in range(3):
            own = [[float(x) for x in each[row, head]] for each in scores]
            if align and up:
                means = [sum(each[j] for j in up) / len(up) for each in own]
                own = [[x * means[-1] / mean for x in each] for each, mean in zip(own, means, strict=True)]
            want = [(max if how == "max" else sum)(column) for column in zip(*own, strict=True)]
            torch.testing.assert_close(got[row, head].double(), torch.tensor(want).double(), rtol=1e-5, atol=1e-6)


def test_the_scale_of_aligned_scores_does_not_matter() -> None:
    one, other = made(0, 2, 2, 9).abs(), made(1, 2, 2, 9).abs()
    for how in ("max", "sum"):
        want = ops.join_key_scores([one, other], None, 2, True, how)
        for factor in (1e-3, 7.0, 1e4):
            got = ops.join_key_scores([one * factor, other], None, 2, True, how)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


def test_scores_that_are_all_zero_stay_so() -> None:
    zero, one = torch.zeros(1, 1, 5), made(0, 1, 1, 5).abs()
    assert torch.equal(ops.join_key_scores([zero, one], None, 0, True, "sum"), one)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 10),
    width=st.sampled_from([0, 2, 4, 6]),
    neighbours=st.booleans(),
    scale=st.sampled_from([1.0, 1.3]),
    heads=st.sampled_from([1, 2]),
)
def test_unturn_keys(seed: int, tokens: int, width: int, neighbours: bool, scale: float, heads: int) -> None:
    plain = made(seed, 2, 2, tokens, 6).double()
    pairs = width // 2
    angles = made(seed + 1, 2, heads, tokens, pairs).double() * 5
    turned = plain.clone()
    for pair in range(pairs):
        one, two = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + pairs)
        cos, sin = angles[..., pair].cos() * scale, angles[..., pair].sin() * scale
        turned[..., one] = plain[..., one] * cos - plain[..., two] * sin
        turned[..., two] = plain[..., two] * cos + plain[..., one] * sin
    wide = angles.repeat_interleave(2, -1) if neighbours else torch.cat([angles, angles], -1)
    tables = ((wide.cos() * scale).float(), (wide.sin() * scale).float())
    got = ops.unturn_keys(turned.float(), *tables, neighbours)
    torch.testing.assert_close(got.double(), plain, rtol=1e-4, atol=1e-5)


def cosine(x: Tensor, y: Tensor) -> float:
    size = float(x.double().norm() * y.double().norm())
    return max(float(x.double() @ y.double()) / size, 0.0) if size else 0.0


def naive_classes(
    keys: Tensor, values: Tensor, scores: list[float], index: list[int], up: list[int], alike: float, spare: float
) -> list[int]:
    """Classes of one head's tokens."""
    out = [index.index(j) + 1 if j in index else 0 for j in range(len(scores))]
    total, so_far = sum(max(scores[j], 0.0) for j in up), 0.0
    lost = set()
    for j in sorted(up, key=lambda j: (scores[j], -j)):
        so_far += max(scores[j], 0.0)
        if spare == 0 or so_far > spare * total * (1 + 1e-6):
            break
        lost.add(j)
    centres = [c for c in index if c in up]
    for j in up:
        if j in index or j in lost or not centres:
            continue
        likeness = [cosine(keys[j], keys[c]) * cosine(values[j], values[c]) for c in centres]
        if max(likeness) >= alike:
            out[j] = index.index(centres[likeness.index(max(likeness))]) + 1
    return out


@settings(max_examples=80)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 10),
    share=st.floats(0, 1),
    first=st.integers(0, 2),
    last=st.integers(0, 3),
    alike=st.sampled_from([0.0, 0.3, 1.1]),
    spare=st.sampled_from([0.0, 0.2, 1.0]),
    padding=st.booleans(),
    some=st.booleans(),
)
def test_assign_and_merge_keys(
    seed: int,
    tokens: int,
    share: float,
    first: int,
    last: int,
    alike: float,
    spare: float,
    padding: bool,
    some: bool,
) -> None:
    """Whatever goes into none may hold what is no number."""
    keys, values, scores = made(seed, 2, 3, tokens, 3), made(seed + 1, 2, 3, tokens, 2), made(seed + 2, 2, 3, tokens)
    scores = scores.abs()
    real = padded(seed, 2, tokens) if padding else None
    among = padded(seed + 7, 2, tokens) if some else None
    k = round(share * tokens)
    index = ops.keep_keys(scores, real, among, first, last, k)
    got = ops.assign_keys(keys, values, scores, index, real, among, first, last, alike, spare)
    spoiled = values.masked_fill((got == 0)[..., None], math.nan)
    merged = ops.merge_keys(spoiled, index, got, scores, None, None, None, False)
    for row in range(2):
        up = candidates(real, among, row, tokens, first, last)
        for head in range(3):
            own = [float(x) for x in scores[row, head]]
            chosen = index[row, head].tolist()
            want = naive_classes(keys[row, head], values[row, head], own, chosen, up, alike, spare)
            assert got[row, head].tolist() == want
            for place, j in enumerate(chosen):
                members = [i for i in range(tokens) if want[i] == place + 1]
                if members == [j]:
                    assert torch.equal(merged[row, head, place], values[row, head, j])
                    continue
                mean = sum(own[i] * values[row, head, i].double() for i in members) / sum(own[i] for i in members)
                torch.testing.assert_close(merged[row, head, place].double(), mean, rtol=1e-4, atol=1e-5)


def test_without_limits_all_others_are_merged() -> None:
    keys, values, scores = made(0, 1, 2, 9, 4), made(1, 1, 2, 9, 4), made(2, 1, 2, 9).abs()
    index = ops.keep_keys(scores, None, None, 0, 2, 4)
    got = ops.assign_keys(keys, values, scores, index, None, None, 0, 2, 0.0, 0.0)
    assert (got > 0).all()
    for head in range(2):
        sizes = torch.bincount(got[0, head], minlength=5)[1:]
        assert sizes.sum() == 9 and (sizes[-2:] == 1).all()


def test_copies_join_and_opposites_do_not() -> None:
    """Two negative cosines have a positive product."""
    keys, values = made(0, 1, 1, 5, 4), made(1, 1, 1, 5, 4)
    keys[0, 0, 1], values[0, 0, 1] = keys[0, 0, 3], values[0, 0, 3]
    keys[0, 0, 2], values[0, 0, 2] = -keys[0, 0, 3], -values[0, 0, 3]
    scores, index = torch.tensor([[[1.0, 2.0, 3.0, 9.0, 4.0]]]), torch.tensor([[[3]]])
    got = ops.assign_keys(keys, values, scores, index, None, None, 0, 0, 0.999, 0.0)
    assert got.tolist() == [[[0, 1, 0, 1, 0]]]
    merged = ops.merge_keys(values, index, got, scores, None, None, None, False)
    torch.testing.assert_close(merged[0, 0, 0], values[0, 0, 3])


def test_the_first_of_two_equal_keys_that_stay_takes_the_third() -> None:
    keys = made(0, 1, 1, 1, 4).expand(1, 1, 4, 4)
    scores, index = torch.ones(1, 1, 4), torch.tensor([[[1, 2]]])
    got = ops.assign_keys(keys, keys, scores, index, None, None, 0, 0, 0.9, 0.0)
    assert got.tolist() == [[[1, 1, 2, 1]]]


def test_weights_of_nothing_leave_the_key_that_stays() -> None:
    cache, index = made(0, 1, 1, 3, 4), torch.tensor([[[1]]])
    classes, weights = torch.tensor([[[1, 1, 0]]]), torch.zeros(1, 1, 3)
    assert torch.equal(ops.merge_keys(cache, index, classes, weights, None, None, None, False)[0, 0, 0], cache[0, 0, 1])


@pytest.mark.parametrize("neighbours", [False, True])
def test_means_of_plain_keys_are_turned_at_the_place_of_the_one_that_stays(neighbours: bool) -> None:
    """Three equal keys at other places: the one that stays is as it was."""
    plain = made(0, 1, 1, 1, 4).expand(1, 1, 3, 4)
    angles = torch.arange(3.0)[:, None] * torch.tensor([1.0, 0.1])
    wide = angles.repeat_interleave(2, 1) if neighbours else torch.cat([angles, angles], 1)
    cos, sin = wide.cos()[None, None], wide.sin()[None, None]
    turned = torch.empty(1, 1, 3, 4)
    for pair in range(2):
        one, two = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + 2)
        turned[..., one] = plain[..., one] * cos[..., one] - plain[..., two] * sin[..., one]
        turned[..., two] = plain[..., two] * cos[..., one] + plain[..., one] * sin[..., one]
    found = ops.unturn_keys(turned, cos, sin, neighbours)
    index, ones = torch.tensor([[[2]]]), torch.ones(1, 1, 3)
    got = ops.merge_keys(turned, index, ones.long(), ones, found, cos, sin, neighbours)
    torch.testing.assert_close(got[0, 0, 0], turned[0, 0, 2])
    assert not torch.allclose(ops.merge_keys(turned, index, ones.long(), ones, None, None, None, False), got)


def test_rows_and_heads_do_not_see_each_other() -> None:
    keys, values, scores = made(0, 3, 2, 9, 4), made(1, 3, 2, 9, 4), made(2, 3, 2, 9).abs()

    def run(k: Tensor, v: Tensor, s: Tensor) -> Tensor:
        index = ops.keep_keys(s, None, None, 0, 1, 4)
        classes = ops.assign_keys(k, v, s, index, None, None, 0, 1, 0.2, 0.1)
        return ops.merge_keys(v, index, classes, s, None, None, None, False)

    rows, heads = [2, 0, 1], [1, 0]
    got = run(*(x[rows][:, heads] for x in (keys, values, scores)))
    assert torch.equal(got, run(keys, values, scores)[rows][:, heads])


def test_half_precision_is_added_up_in_float32() -> None:
    values = made(0, 1, 1, 300, 4).to(torch.bfloat16)
    index, ones = torch.tensor([[[7]]]), torch.ones(1, 1, 300)
    got = ops.merge_keys(values, index, ones.long(), ones, None, None, None, False)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got[0, 0, 0], values[0, 0].float().mean(0).to(torch.bfloat16), rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    x, s, index = made(0, 1, 2, 5, 4), made(1, 1, 2, 5), torch.zeros(1, 2, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="of one shape"):
        ops.join_key_scores([s, s[:, :1]], None, 0, False, "max")
    with pytest.raises(ValueError, match="how must be"):
        ops.join_key_scores([s], None, 0, False, "mean")
    with pytest.raises(ValueError, match="keys and tables must be"):
        ops.unturn_keys(x, s, s, False)
    with pytest.raises(ValueError, match="keys, values, scores and index"):
        ops.assign_keys(x, x[:, :1], s, index, None, None, 0, 0, 0.5, 0.0)
    with pytest.raises(ValueError, match="plain keys must be"):
        ops.merge_keys(x, index, s.long(), s, x, None, None, False)
