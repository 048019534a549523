"""Operators that score, choose, place and read cached keys, against loops over rows, heads and tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import routed
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tokcompile.kernels  # noqa: F401  registers the operators

ops = torch.ops.tokred
SEEDS = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


def floats(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(seed: int, rows: int, tokens: int) -> Tensor:
    """bool [rows, tokens]: False for up to all but three tokens on the left."""
    rng = torch.Generator().manual_seed(seed)
    pads = torch.randint(0, tokens - 2, (rows, 1), generator=rng)
    return torch.arange(tokens) >= pads


def votes_by_hand(query: Tensor, key: Tensor, valid: Tensor, first: int, last: int) -> Tensor:
    out = torch.zeros(key.shape[0], 1, key.shape[2], dtype=torch.float64)
    for row in range(query.shape[0]):
        places = [j for j, here in enumerate(valid[row].tolist()) if here]
        candidates = places[first : max(len(places) - last, 0)]
        for head in range(query.shape[1]):
            keys = key[row, head // (query.shape[1] // key.shape[1])].double()
            each = {j: math.exp(float(query[row, head].double() @ keys[j])) for j in candidates}
            for j, weight in each.items():
                out[row, 0, j] += weight / sum(each.values())
    return out


@few
@given(seed=SEEDS, first=st.integers(0, 3), last=st.integers(1, 4))
def test_votes(seed: int, first: int, last: int) -> None:
    query, key, valid = floats(seed, 2, 4, 6), floats(seed + 1, 2, 2, 11, 6), padded(seed, 2, 11)
    votes = ops.key_votes(query, key, valid, first, last)
    torch.testing.assert_close(votes.double(), votes_by_hand(query, key, valid, first, last), rtol=1e-5, atol=1e-6)
    for row in range(2):
        count = int(valid[row].sum()) - first - last
        assert votes[row].sum().item() == pytest.approx(4 if count > 0 else 0, abs=1e-5)


@few
@given(seed=SEEDS)
def test_votes_follow_heads_and_candidates(seed: int) -> None:
    """Heads in another order give the same votes; candidates in another order give the votes in that order."""
    query, key = floats(seed, 1, 4, 6), floats(seed + 1, 1, 4, 9, 6)
    votes = ops.key_votes(query, key, None, 0, 1)
    heads = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(ops.key_votes(query[:, heads], key[:, heads], None, 0, 1), votes)
    order = torch.cat([torch.randperm(8, generator=torch.Generator().manual_seed(seed)), torch.tensor([8])])
    torch.testing.assert_close(ops.key_votes(query, key[:, :, order], None, 0, 1), votes[:, :, order])


def test_a_planted_key_gets_the_votes() -> None:
    query, key = floats(0, 1, 4, 8), floats(1, 1, 2, 20, 8) * 0.1
    for head in range(2):
        key[0, head, 7] = 10 * query[0, 2 * head : 2 * head + 2].mean(0)
    votes = ops.key_votes(query, key, None, 2, 3)
    assert ops.keep_keys(votes, None, None, 2, 3, 6)[0, 0].tolist() == [0, 1, 7, 17, 18, 19]


def test_heads_share_keys_in_order() -> None:
    """The other map, head modulo the number of cached heads, chooses other keys."""
    query, key = floats(3, 1, 8, 16), floats(4, 1, 2, 64, 16)
    own = ops.keep_keys(ops.key_votes(query, key, None, 0, 1), None, None, 0, 1, 9)
    other = ops.key_votes(query.view(1, 4, 2, 16).transpose(1, 2).reshape(1, 8, 16), key, None, 0, 1)
    assert not torch.equal(own, ops.keep_keys(other, None, None, 0, 1, 9))


def test_coarse_votes_choose_nearly_the_same() -> None:
    """Scores and votes kept in bfloat16, as the authors' code does, against float32."""
    query, key = floats(5, 1, 8, 32) / 6, floats(6, 1, 2, 2000, 32)
    keys = key.repeat_interleave(4, 1)
    coarse = (query.bfloat16()[:, :, None] @ keys.bfloat16().transpose(2, 3)).softmax(-1)[:, :, 0].sum(1)
    fine = ops.key_votes(query, key, None, 0, 0)[0]
    chosen = [set(v[0].float().topk(512).indices.tolist()) for v in (coarse, fine)]
    assert 0.9 < len(chosen[0] & chosen[1]) / 512 < 1


@few
@given(seed=SEEDS, neighbours=st.booleans(), start=st.integers(0, 2), by=st.integers(-40, 40))
def test_turning_is_the_rotation_of_the_difference(seed: int, neighbours: bool, start: int, by: int) -> None:
    frequencies = [1.0, 0.1, 0.01]
    layout = routed.Layout(frequencies, start, neighbours)
    x, here = floats(seed, 2, 2, 5, 9), torch.arange(10).view(2, 5)
    got = ops.turn_pairs(x, here, here + by, torch.tensor(frequencies), start, neighbours)
    for row, head, token in [(0, 0, 0), (0, 1, 4), (1, 0, 2)]:
        torch.testing.assert_close(
            got[row, head, token].double(), layout.turn(x[row, head, token], by), rtol=0, atol=1e-5
        )


@few
@given(seed=SEEDS, neighbours=st.booleans(), to_one=st.booleans())
def test_each_coordinate_turns_pairs_of_its_own(seed: int, neighbours: bool, to_one: bool) -> None:
    """As if each pair were turned alone, by the position that is its own."""
    frequencies, coordinate = torch.tensor([1.0, 0.3, 0.1, 0.02]), [0, 2, 1, 2]
    x, here = floats(seed, 2, 3, 5, 8), whole(seed + 1, 2, 1, 5, 3)
    there = whole(seed + 2, 2, 5) if to_one else whole(seed + 2, 1, 1, 5, 3)
    got = ops.turn_pairs(x, here, there, frequencies, 0, neighbours, coordinate)
    for pair, own in enumerate(coordinate):
        both = [2 * pair, 2 * pair + 1] if neighbours else [pair, pair + 4]
        to = there if to_one else there[..., own]
        alone = ops.turn_pairs(x[..., both], here[..., own], to, frequencies[pair : pair + 1], 0, False)
        torch.testing.assert_close(got[..., both], alone, rtol=0, atol=1e-6)


def whole(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("here", "there", "coordinate", "said"),
    [
        ((1, 1, 5, 3), (1, 5), None, "must be .B, T. or .B, H, T., not"),
        ((1, 1, 5, 3), (1, 1, 5, 2), 2, "3 coordinates here and 2 there"),
        ((1, 1, 5, 3), (1, 5), 3, "for each of 2 pairs"),
        ((5,), (1, 5), 2, "B, H, T, A"),
        ((1, 1, 5, 1), (1, 5), 2, "coordinates up to 1, and tokens have 1"),
    ],
)
def test_positions_that_do_not_fit_are_refused(here: Any, there: Any, coordinate: int | None, said: str) -> None:
    given = None if coordinate is None else list(range(coordinate))
    with pytest.raises(ValueError, match=said):
        ops.turn_pairs(floats(0, 1, 2, 5, 4), torch.ones(here), torch.ones(there), torch.ones(2), 0, False, given)


def test_turning_far_back_is_exact() -> None:
    """At a million tokens a float32 angle is off by a thirtieth of a radian; the model's own rounding is undone."""
    frequencies, far = torch.tensor([1.0, 0.7]), torch.full((1, 1), 999_983)
    x = floats(0, 1, 1, 1, 4)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    angle = far[..., None].float() * frequencies
    cos, sin = (torch.cat([w, w], -1) for w in (angle.cos(), angle.sin()))
    turned = x * cos + torch.cat([-x[..., 2:], x[..., :2]], -1) * sin
    back = ops.turn_pairs(turned, far, zero, frequencies, 0, False)
    assert (back - x).abs().max() < 1e-6


@few
@given(seed=SEEDS, neighbours=st.booleans(), per=st.sampled_from(["kv_head", "query_head"]), start=st.integers(0, 1))
def test_partial_products(seed: int, neighbours: bool, per: str, start: int) -> None:
    query, key, valid = floats(seed, 2, 4, 7), floats(seed + 1, 2, 2, 9, 7), padded(seed, 2, 9)
    rng = torch.Generator().manual_seed(seed)
    table = [torch.randperm(3, generator=rng)[:2].tolist() for _ in range(2 if per == "kv_head" else 4)]
    got = ops.pair_scores(query, key, torch.tensor(table, dtype=torch.int16), valid, start, 3, neighbours)
    rest = tuple(d for d in range(7) if not start <= d < start + 6)
    naive = routed.Frequencies(routed.Layout([1.0] * 3, start, neighbours), [table], 4, per=per, rest=rest)
    for row in range(2):
        places = valid[row].nonzero()[:, 0].tolist()
        for head in range(got.shape[1]):
            if per == "query_head":
                expected = naive.scores(query[row, head], key[row, head // 2, places], table[head])
            else:
                each = [
                    routed._standard(naive.scores(query[row, h], key[row, head, places], table[head]))
                    for h in (2 * head, 2 * head + 1)
                ]
                expected = [sum(column) for column in zip(*each, strict=True)]
            torch.testing.assert_close(got[row, head, places], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_all_pairs_make_the_whole_product() -> None:
    query, key = floats(0, 1, 4, 10), floats(1, 1, 4, 6, 10)
    whole = (key @ query[..., None])[..., 0]
    for neighbours in (False, True):
        every = torch.arange(4).expand(4, 4)
        torch.testing.assert_close(ops.pair_scores(query, key, every, None, 1, 4, neighbours), whole)


def test_a_key_comes_back_for_another_query() -> None:
    """Nothing is lost: two queries choose apart."""
    query = floats(0, 1, 1, 8)
    key = torch.cat([query.expand(1, 5, 8) + 0.01 * floats(1, 1, 5, 8), -query.expand(1, 5, 8)], 1)[:, None]
    every = torch.arange(4)[None]
    one, other = (
        set(ops.keep_keys(ops.pair_scores(q, key, every, None, 0, 4, False), None, None, 0, 0, 5)[0, 0].tolist())
        for q in (query, -query)
    )
    assert one == set(range(5)) and other == set(range(5, 10))


@few
@given(seed=SEEDS, heads=st.sampled_from([1, 2, 4]), softcap=st.sampled_from([0.0, 3.0]), sunk=st.booleans())
def test_attention_to_gathered_keys(seed: int, heads: int, softcap: float, sunk: bool) -> None:
    """One choice for all heads, one for each cached head, or one for each query head."""
    query, key, value = floats(seed, 2, 4, 3, 8), floats(seed + 1, 2, 2, 9, 8), floats(seed + 2, 2, 2, 9, 5)
    valid = padded(seed, 2, 9)
    mask = ops.seen_keys(valid.long(), query, key, True)
    order = floats(seed + 3, 2, heads, 9)
    index = ops.keep_keys(order, valid, None, 0, 3, 5)
    sinks = floats(seed + 4, 4) if sunk else None
    keys, values = ops.gather_keys(key, index), ops.gather_keys(value, index)
    got = ops.attend(query, keys, values, ops.gather_mask(mask, index), 0.3, softcap, sinks)
    for row in range(2):
        for head in range(4):
            picks = index[row, head // (4 // heads)].tolist()
            for i in range(3):
                seen = [j for j in picks if valid[row, j] and j <= 6 + i]
                if not valid[row, 6 + i]:
                    continue
                logits = [0.3 * float(query[row, head, i] @ key[row, head // 2, j]) for j in seen]
                logits = [softcap * math.tanh(x / softcap) if softcap else x for x in logits]
                weights = [math.exp(x) for x in logits]
                total = sum(weights) + (math.exp(float(sinks[head])) if sunk else 0)
                expected = sum(w * value[row, head // 2, j] for w, j in zip(weights, seen, strict=True)) / total
                torch.testing.assert_close(got[row, head, i], expected, rtol=1e-4, atol=1e-5)


def test_positions_of_keys_follow_either_count() -> None:
    """Real tokens alone, as generate counts, also where padding stands between; or all columns."""
    valid = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]]).bool()
    key = torch.zeros(3, 1, 6, 4)
    positions = torch.tensor([[2, 3], [3, 4], [4, 5]])
    got = ops.key_positions(positions, valid, key).tolist()
    assert got == [[0, 0, 0, 1, 2, 3], [0, 1, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]
    assert ops.key_positions(positions[:1], None, key).tolist() == [list(range(6))] * 3


def test_the_mean_of_real_queries() -> None:
    query, valid = floats(0, 2, 2, 3, 4), torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()
    got = ops.mean_query(query, valid)
    torch.testing.assert_close(got[0], query[0, :, 1:].mean(1))
    torch.testing.assert_close(got[1], query[1].mean(1))


def test_real_keys_are_what_the_last_query_sees() -> None:
    seen = torch.tensor([[[[0, 1, 1, 0], [0, 1, 1, 1]]]]).bool()
    key = torch.zeros(2, 1, 4, 3)
    additive = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for mask in (seen, additive, additive.bfloat16()):
        assert ops.real_keys(mask, key).tolist() == [[False, True, True, True]] * 2


def test_thresholds_of_likeness() -> None:
    one = floats(0, 4, 6)
    other = torch.stack([one[0] * 3, -one[1], one[2] * 0, floats(1, 6)])
    assert ops.alike(one, other, -1.0).all()
    assert not ops.alike(one, other, 1.01).any()
    assert ops.alike(one, other, 0.999).tolist() == [True, False, False, False]


def test_an_earlier_choice_keeps_its_place() -> None:
    held, new = torch.tensor([[[1, 4, -1]], [[1, 2, 3]]]), torch.tensor([[[0, 2, 8, 9]], [[5, 6, 8, 9]]])
    got = ops.reuse_keys(held, new, torch.tensor([False, True]), 2)
    assert got.tolist() == [[[0, 2, 8, 9]], [[1, 2, 8, 9]]]
