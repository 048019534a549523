"""Operators that score and choose keys of caches: against loops over rows, heads and tokens, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from drawn import made, padded
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401

ops = torch.ops.tokred


def attention(q: Tensor, k: Tensor, case: dict[str, Any], row: int, head: int, i: int) -> list[float]:
    """Probabilities of one query."""
    group = q.shape[1] // k.shape[1]
    logits = []
    for j in range(k.shape[2]):
        logit = float(q[row, head, i].double() @ k[row, head // group, j].double()) * case["scale"]
        if case["softcap"]:
            logit = math.tanh(logit / case["softcap"]) * case["softcap"]
        hidden = (case["causal"] and j > i) or (case["mask"] is not None and not case["mask"][row, 0, 0, j])
        logits.append(-math.inf if hidden else logit)
    top = max(logits)
    if top == -math.inf:
        return [0.0] * len(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [w / sum(weights) for w in weights]


@settings(max_examples=40)
@given(
    seed=st.integers(0, 999),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 9),
    groups=st.sampled_from([(2, 2, 2), (4, 2, 2), (4, 4, 2), (4, 2, 1)]),
    window=st.integers(0, 6),
    heads=st.sampled_from(["mean", "max", "sum"]),
    reduce=st.sampled_from(["sum", "mean", "seen"]),
    causal=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    padding=st.booleans(),
)
def test_key_attention(
    seed: int,
    batch: int,
    tokens: int,
    groups: tuple[int, int, int],
    window: int,
    heads: str,
    reduce: str,
    causal: bool,
    softcap: float,
    padding: bool,
) -> None:
    count, keys, cached = groups
    q, k = made(seed, batch, count, tokens, 4), made(seed + 1, batch, keys, tokens, 4)
    real = padded(seed, batch, tokens) if padding else None
    mask = None if real is None else real[:, None, None]
    case = {"scale": 0.7, "softcap": softcap, "causal": causal, "mask": mask}
    got = ops.key_attention(q, k, mask, real, window, cached, 0.7, causal, softcap, heads, reduce)
    want = torch.zeros(batch, cached, tokens, dtype=torch.float64)
    for row in range(batch):
        places = [i for i in range(tokens) if real is None or real[row, i]]
        rows = places[-window:] if window else places
        for head in range(cached):
            share = count // cached
            for j in range(tokens):
                each = []
                for own in range(head * share, (head + 1) * share):
                    seen = [attention(q, k, case, row, own, i)[j] for i in rows]
                    visible = [i for i in rows if (not causal or j <= i) and (mask is None or mask[row, 0, 0, j])]
                    divisor = {"sum": 1, "mean": len(rows), "seen": max(len(visible), 1)}[reduce]
                    each.append(sum(seen) / divisor)
                want[row, head, j] = max(each) if heads == "max" else sum(each) / (share if heads == "mean" else 1)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_key_attention_sums_to_its_queries() -> None:
    q, k = made(0, 2, 4, 11, 8), made(1, 2, 2, 11, 8)
    got = ops.key_attention(q, k, None, None, 0, 2, 0.3, True, 0.0, "mean", "sum")
    torch.testing.assert_close(got.sum(2), torch.full((2, 2), 11.0))
    got = ops.key_attention(q, k, None, None, 4, 2, 0.3, True, 0.0, "mean", "sum")
    torch.testing.assert_close(got.sum(2), torch.full((2, 2), 4.0))


def test_uniform_attention_of_the_queries_that_see_a_key_is_a_harmonic_number() -> None:
    tokens = 12
    zeros = torch.zeros(1, 1, tokens, 4)
    got = ops.key_attention(zeros, zeros, None, None, 0, 1, 1.0, True, 0.0, "mean", "seen")[0, 0]
    want = [sum(1 / (i + 1) for i in range(j, tokens)) / (tokens - j) for j in range(tokens)]
    torch.testing.assert_close(got, torch.tensor(want))


def test_an_additive_mask_and_sinks_count_for_key_attention() -> None:
    q, k = made(0, 1, 2, 5, 4), made(1, 1, 2, 5, 4)
    mask = torch.full((1, 1, 5, 5), torch.finfo(torch.float32).min).triu(1)
    plain = ops.key_attention(q, k, mask, None, 2, 2, 0.5, False, 0.0, "mean", "sum")
    torch.testing.assert_close(plain, ops.key_attention(q, k, None, None, 2, 2, 0.5, True, 0.0, "mean", "sum"))
    sunk = ops.key_attention(q, k, mask, None, 2, 2, 0.5, False, 0.0, "mean", "sum", torch.tensor([0.0, -9e9]))
    assert sunk[0, 0].sum() < 2 - 1e-3
    torch.testing.assert_close(sunk[0, 1], plain[0, 1])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 10),
    window=st.integers(0, 5),
    kernel=st.sampled_from([1, 3, 5]),
    how=st.sampled_from(["avg", "max"]),
    padding=st.booleans(),
)
def test_smooth_keys(seed: int, tokens: int, window: int, kernel: int, how: str, padding: bool) -> None:
    """Real tokens of a row that stand together are pooled as if they were alone."""
    scores = made(seed, 2, 3, tokens).abs()
    lead = [0, min(seed % 3, tokens - 1)] if padding else [0, 0]
    real = torch.arange(tokens) >= torch.tensor(lead)[:, None]
    scores = torch.where(real[:, None], scores, 0.0)
    got = ops.smooth_keys(scores, real if padding else None, window, kernel, how)
    for row, first in enumerate(lead):
        for head in range(3):
            own = scores[row, head, first:].tolist()
            own = [0.0 if j >= len(own) - window else value for j, value in enumerate(own)]
            for j in range(len(own)):
                near = [own[i] if 0 <= i < len(own) else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
                want = max(near) if how == "max" else sum(near) / kernel
                assert got[row, head, first + j] == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("how", ["avg", "max"])
def test_one_graph_smooths_keys_of_any_length(how: str) -> None:
    class Smooth(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return ops.smooth_keys(scores, None, 2, 3, how)

    shapes = {"scores": {2: torch.export.Dim("tokens", min=4, max=64)}}
    graph = torch.export.export(Smooth(), (made(0, 2, 3, 9),), dynamic_shapes=shapes).run_decompositions().module()
    for tokens in (5, 31):
        scores = made(tokens, 2, 3, tokens).abs()
        torch.testing.assert_close(graph(scores), Smooth()(scores), rtol=0, atol=0)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 999),
    tokens=st.integers(1, 10),
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    share=st.floats(0, 1),
    padding=st.booleans(),
    some=st.booleans(),
    ties=st.booleans(),
)
def test_keep_keys(
    seed: int, tokens: int, first: int, last: int, share: float, padding: bool, some: bool, ties: bool
) -> None:
    scores = made(seed, 2, 3, tokens)
    scores = scores.round() if ties else scores
    real = padded(seed, 2, tokens) if padding else None
    among = padded(seed + 7, 2, tokens) if some else None
    k = round(share * tokens)
    got = ops.keep_keys(scores, real, among, first, last, k)
    assert got.shape == (2, 3, k) and got.dtype == torch.int64
    for row in range(2):
        places = [j for j in range(tokens) if real is None or real[row, j]]
        ends = {*places[:first], *(places[-last:] if last else ())}
        for head in range(3):

            def order(
                j: int, row: int = row, head: int = head, places: list[int] = places, ends: set[int] = ends
            ) -> Any:
                stays = j in ends or (among is not None and not among[row, j])
                rank = 2 if stays else 1 if j in places else 0
                return (-rank, -float(scores[row, head, j]) if rank else 0.0, j)

            assert got[row, head].tolist() == sorted(sorted(range(tokens), key=order)[:k])


@settings(max_examples=30)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 8), padding=st.booleans())
def test_key_cosine(seed: int, tokens: int, padding: bool) -> None:
    keys = made(seed, 2, 3, tokens, 5)
    real = padded(seed, 2, tokens) if padding else None
    got = ops.key_cosine(keys, real)
    for row in range(2):
        for head in range(3):
            units = keys[row, head].double() / keys[row, head].double().norm(dim=1, keepdim=True)
            middle = units[[j for j in range(tokens) if real is None or real[row, j]]].mean(0)
            want = units @ (middle / middle.norm())
            torch.testing.assert_close(got[row, head].double(), want, rtol=1e-4, atol=1e-4)


def test_random_keys_depend_on_the_seed_and_the_head_and_not_on_padding() -> None:
    keys = torch.zeros(2, 3, 8, 4)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, :3] = False
    one = ops.random_keys(keys, real, 5)
    assert torch.equal(one[0, :, :5], one[1, :, 3:])
    assert torch.equal(one[0], ops.random_keys(keys, None, 5)[1])
    assert len({tuple(each.tolist()) for each in one[0]}) == 3
    assert not torch.equal(one, ops.random_keys(keys, real, 6))


def test_gathered_keys_free_the_longer_cache() -> None:
    cache = made(0, 2, 3, 9, 4)
    index = torch.tensor([[0, 8], [1, 2], [3, 3]]).expand(2, 3, 2)
    got = ops.gather_keys(cache, index)
    assert got.is_contiguous() and got.untyped_storage().nbytes() == got.numel() * 4
    assert torch.equal(got[1, 1], cache[1, 1, 1:3]) and torch.equal(got[0, 2], cache[0, 2, [3, 3]])
    assert torch.equal(ops.gather_keys(cache, index[:, :1]), cache[:, :, [0, 8]])


def test_what_does_not_fit_is_refused() -> None:
    q = made(0, 1, 4, 3, 4)
    with pytest.raises(ValueError, match="divide among 3 cached heads"):
        ops.key_attention(q, q, None, None, 0, 3, 1.0, False, 0.0, "mean", "sum")
    with pytest.raises(ValueError, match="reduce must be"):
        ops.key_attention(q, q, None, None, 0, 4, 1.0, False, 0.0, "mean", "median")
    with pytest.raises(ValueError, match="kernel must be odd"):
        ops.smooth_keys(q[0], None, 0, 2, "avg")
    with pytest.raises(ValueError, match="cache and index must be"):
        ops.gather_keys(q, torch.zeros(1, 2, 1, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="cannot select"):
        ops.keep_keys(q[0], None, None, 0, 0, 5)
