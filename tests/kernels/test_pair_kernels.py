"""match_pairs, merge_pairs, inverse_map: against loops over pairs, and what a merge must keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rulecases import tome

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


def _lists(metric: torch.Tensor, count: int, leading: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = metric.shape[1]
    packed = ops.match_pairs(metric, count, leading)
    return packed[:, : tokens - count], packed[:, tokens - count : tokens], packed[:, tokens:]


def _sizes(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 5, (batch, tokens)).float()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 14), st.integers(0, 5), st.booleans())
def test_pairs_equal_a_loop(data, batch, tokens, leading, coarse):
    """With coarse values many pairs are equally alike: the lower index wins."""
    leading = min(leading, tokens)
    count = data.draw(st.integers(0, (tokens - leading) // 2))
    metric = torch.randint(1, 3, (batch, tokens, 2)).float() if coarse else torch.randn(batch, tokens, 4)
    stays, given_, into = _lists(metric, count, leading)
    for row in range(batch):
        expected, merged = tome.pairs(metric[row], count, leading)
        assert stays[row].tolist() == expected
        assert [
            (i, stays[row, j].item()) for i, j in zip(given_[row].tolist(), into[row].tolist(), strict=True)
        ] == merged


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(2, 14), st.integers(0, 2), st.booleans())
def test_a_merge_equals_a_loop_and_keeps_the_whole(batch, tokens, leading, sized):
    count = (tokens - min(leading, tokens)) // 2
    metric, x = torch.randn(batch, tokens, 4), torch.randn(batch, tokens, 3)
    size = _sizes(batch, tokens) if sized else None
    lists = _lists(metric, count, min(leading, tokens))
    one = torch.ones(batch, tokens) if size is None else size
    got = ops.merge_pairs(x, size, *lists, True)
    sizes = ops.merge_pairs(torch.ones(batch, tokens, 1), size, *lists, False)[..., 0]
    for row in range(batch):
        values, expected = tome.merge(x[row], one[row], *tome.pairs(metric[row], count, min(leading, tokens)))
        torch.testing.assert_close(got[row], values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sizes[row], expected, rtol=0, atol=0)
    torch.testing.assert_close(sizes.sum(1), one.sum(1))
    torch.testing.assert_close((got * sizes[..., None]).sum(1), (x * one[..., None]).sum(1), rtol=1e-4, atol=1e-5)


def test_two_tokens_that_are_alike_merge_first_and_stay_what_they_were():
    x = torch.randn(1, 9, 4)
    x[0, 6] = x[0, 3]
    stays, given_, into = _lists(x, 1, 1)
    assert given_.tolist() == [[6]] and stays[0, into[0, 0]] == 3
    merged = ops.merge_pairs(x, None, stays, given_, into, True)
    torch.testing.assert_close(merged[0, into[0, 0]], x[0, 3], rtol=0, atol=0)


@pytest.mark.parametrize("leading", [1, 2, 5])
def test_leading_tokens_neither_merge_nor_are_merged_into(leading):
    x = torch.randn(1, 1, 4).expand(1, 12, 4) + torch.randn(1, 12, 4) * 1e-3
    stays, _, into = _lists(x, (12 - leading) // 2, leading)
    assert stays[0, :leading].tolist() == list(range(leading))
    assert into.min() >= leading


def test_an_inverse_brings_back_what_was_not_merged():
    x = torch.randn(2, 11, 4)
    lists = _lists(x, 3, 1)
    merged = ops.merge_pairs(x, None, *lists, True)
    inverse = ops.inverse_map(*lists, x[..., 0])
    whole = ops.gather_tokens(merged, inverse, 1, 0)
    for row in range(2):
        stays, given_, into = (each[row].tolist() for each in lists)
        alone = [t for place, t in enumerate(stays) if place not in into]
        torch.testing.assert_close(whole[row, alone], x[row, alone], rtol=0, atol=0)
        for token, place in zip(given_, into, strict=True):
            assert torch.equal(whole[row, token], whole[row, stays[place]])


def test_attention_that_counts_sizes_equals_attention_to_all_of_what_was_merged():
    """The oracle of proportional attention: merged duplicates weigh as much as the originals did."""
    q, keys, values = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    counts = torch.tensor([1, 3, 1, 2, 1])
    attend = torch.nn.functional.scaled_dot_product_attention
    all_of_them = attend(q, keys.repeat_interleave(counts, 2), values.repeat_interleave(counts, 2))
    torch.testing.assert_close(attend(q, keys, values, counts.float().log()[None, None, None]), all_of_them)


def test_half_precision_chooses_what_float32_chooses():
    metric = torch.randn(2, 12, 8).to(torch.bfloat16)
    assert torch.equal(ops.match_pairs(metric, 4, 1), ops.match_pairs(metric.float(), 4, 1))


def test_a_merge_has_the_gradient_of_a_weighted_mean():
    x = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 6, dtype=torch.float64).add(1).requires_grad_()
    lists = _lists(torch.randn(2, 6, 3), 2, 1)
    assert torch.autograd.gradcheck(lambda v, s: ops.merge_pairs(v, s, *lists, True), (x, size))
    assert torch.autograd.gradcheck(lambda v, s: ops.merge_pairs(v, s, *lists, False), (x, size))


def test_more_pairs_than_there_are_is_refused():
    with pytest.raises(ValueError, match="no 3 pairs among 6 tokens"):
        ops.match_pairs(torch.zeros(1, 6, 2), 3, 1)
    with pytest.raises(ValueError, match="metric must be"):
        ops.match_pairs(torch.zeros(6, 2), 1, 1)
