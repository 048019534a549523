"""The kernel that merges keys of a cache: against float64, and bit for bit where nothing is merged."""

from __future__ import annotations

import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, strided
from torch import Tensor

EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
"""The interpreter rounds to bfloat16 toward zero."""
SEEDS = st.integers(0, 100)


def values(seed: int, *shape: int) -> Tensor:
    return made(seed, *shape)


def whole_numbers(seed: int, most: int, *shape: int) -> Tensor:
    found = torch.randint(0, most, shape, generator=torch.Generator().manual_seed(seed))
    return found


def merged(
    cache: Tensor,
    index: Tensor,
    classes: Tensor,
    weights: Tensor,
    plain: Tensor | None,
    angles: Tensor | None,
    neighbours: bool,
) -> Tensor:
    """Slot by slot, in float64; rotations as products of complex numbers."""
    batch, heads, kept = index.shape
    out = cache.gather(2, index[..., None].expand(-1, -1, -1, cache.shape[3])).double()
    for row, head, slot in torch.cartesian_prod(*map(torch.arange, (batch, heads, kept))).tolist():
        members = (classes[row, head] == slot + 1).nonzero().flatten()
        share = weights[row, head, members].double().clamp(min=0)
        if len(members) < 2 or share.sum() <= 0:
            continue
        mean = ((cache if plain is None else plain)[row, head, members].double() * share[:, None]).sum(0) / share.sum()
        if angles is not None:
            mean = _turned(mean, angles[row % len(angles), head % angles.shape[1], index[row, head, slot]], neighbours)
        out[row, head, slot] = mean
    return out


def _turned(x: Tensor, angles: Tensor, neighbours: bool) -> Tensor:
    pairs = len(angles)
    places = torch.arange(pairs)
    one, two = (2 * places, 2 * places + 1) if neighbours else (places, places + pairs)
    turned = torch.complex(x[one], x[two]) * torch.polar(torch.ones_like(angles.double()), angles.double())
    out = x.clone()
    out[one], out[two] = turned.real, turned.imag
    return out


@settings(max_examples=15)
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([(8, 3), (12, 6), (33, 4)]),
    st.sampled_from([1, 5, 20, 40]),
    st.integers(0, 2),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_means_of_classes(dtype, head, kept, kind, turn, neighbours, seed):
    width, pairs = head
    cache = strided(values(seed, 2, 2, 70, width).to(dtype), kind)
    index = whole_numbers(seed, 70, 2, 2, kept)
    classes = whole_numbers(seed + 1, kept + 1, 2, 2, 70)
    weights = values(seed + 2, 2, 2, 70)
    plain = strided(values(seed + 3, 2, 2, 70, width), kind) if turn else None
    angles = values(seed + 4, 1 + seed % 2, 1 + seed % 3 % 2, 70, pairs) * 5 if turn else None
    cos, sin = (None, None) if angles is None else tables(angles, neighbours)
    found = launched("merge_keys", cache, index, classes, weights, plain, cos, sin, neighbours)
    wanted = merged(cache, index, classes, weights, plain, angles, neighbours)
    assert found.dtype == dtype
    bound = EPSILON[dtype] * wanted.abs() + 2e-5
    assert ((found.double() - wanted).abs() <= bound).all()


def tables(angles: Tensor, neighbours: bool) -> tuple[Tensor, Tensor]:
    wide = angles.repeat_interleave(2, -1) if neighbours else torch.cat([angles, angles], -1)
    return wide.cos(), wide.sin()


@pytest.mark.parametrize("alone", ["no class", "one member", "no weight"])
def test_what_is_not_merged_is_as_in_the_cache(alone: str) -> None:
    cache = values(0, 1, 2, 20, 8).to(torch.bfloat16)
    cache[0, 0, 3] = torch.nan  # goes nowhere
    index = torch.arange(4, 10).expand(1, 2, 6).contiguous()
    classes = torch.zeros(1, 2, 20, dtype=torch.int64)
    if alone != "no class":
        classes[..., 4:10] = torch.arange(1, 7)
    if alone == "no weight":
        classes[..., 10:16] = torch.arange(1, 7)
    weights = torch.full((1, 2, 20), -1.0 if alone == "no weight" else 1.0)
    found = launched("merge_keys", cache, index, classes, weights, None, None, None, False)
    assert torch.equal(found, cache[:, :, 4:10])


def test_runs_agree_bit_for_bit() -> None:
    args = (
        values(0, 1, 1, 130, 64),
        whole_numbers(1, 130, 1, 1, 9),
        whole_numbers(2, 10, 1, 1, 130),
        values(3, 1, 1, 130),
    )
    one, other = (launched("merge_keys", *args, None, None, None, False) for _ in range(2))
    assert torch.equal(one, other)
