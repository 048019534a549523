"""Kernels that pack marked sequences, and that turn queries and keys."""

from __future__ import annotations

import pytest
import torch
from drawn import made
from hypothesis import given, settings
from hypothesis import strategies as st
from launched import launched, strided

from tokcompile.kernels import kernel_fault, reference_of, triton_turn_pairs
from tokcompile.kernels._library import kernel_reference

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
# The interpreter rounds to bfloat16 toward zero, by up to 2^-7, where a GPU rounds to the nearest.
EPSILON = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
SEEDS = st.integers(0, 100)
KINDS = st.integers(0, 2)


def values(seed: int, *shape: int) -> torch.Tensor:
    return made(seed, *shape)


def runs(seed: int, batch: int, tokens: int) -> torch.Tensor:
    share = (0.7, 0.0, 1.0, 0.3)[seed % 4]
    found = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < share
    return strided(found, seed % 3)


@settings(max_examples=25)
@given(st.sampled_from([1, 9, 40]), st.integers(0, 45), SEEDS)
def test_slots(tokens, length, seed):
    marked = runs(seed, 3, tokens)
    found, wanted = launched("mark_slots", marked, length), reference_of("mark_slots")(marked, length)
    assert found.dtype == wanted.dtype and torch.equal(found, wanted)


def test_slots_of_long_rows():
    marked = runs(3, 2, 5000)
    assert torch.equal(launched("mark_slots", marked, 4700), reference_of("mark_slots")(marked, 4700))


@settings(max_examples=20)
@given(DTYPES, st.sampled_from([None, (7,), (2, 7), (2, 11, 7)]), st.booleans(), KINDS, SEEDS)
def test_tokens_of_a_marked_sequence(dtype, shape, wide, kind, seed):
    x = strided(values(seed, 2, 12, 7).to(dtype), kind)
    slots = reference_of("mark_slots")(runs(seed, 2, 12), 11)
    content = None if shape is None else strided(values(seed + 1, *shape).to(torch.float32 if wide else dtype), kind)
    found = launched("mark_tokens", x, slots, content)
    wanted = reference_of("mark_tokens")(x, slots, content)
    assert found.dtype == dtype
    assert torch.equal(found[slots >= -1], wanted[slots >= -1])
    within = EPSILON[dtype] if wide and dtype == torch.bfloat16 else 0
    torch.testing.assert_close(found, wanted, rtol=within, atol=0)


@settings(max_examples=30)
@given(DTYPES, st.sampled_from([None, (20,), (2, 20), (2, 60, 20)]), st.integers(0, 60), KINDS, SEEDS)
def test_slots_and_tokens_at_once(dtype, shape, length, kind, seed):
    x, marked = strided(values(seed, 2, 50, 20).to(dtype), kind), runs(seed, 2, 50)
    content = None
    if shape is not None:
        given = values(seed + 1, *shape).to(dtype)
        content = strided(given[:, :length] if len(shape) == 3 else given, kind)
    found = launched("mark_pack", x, marked, length, content, False)
    wanted = kernel_reference("mark_pack")(x, marked, length, content, False)
    assert torch.equal(found[1], wanted[1])
    assert found[0].dtype == dtype and torch.equal(found[0], wanted[0])


@settings(max_examples=30)
@given(DTYPES, st.sampled_from([1, 15, 50, 90]), st.sampled_from([3, 20, 300]), KINDS, SEEDS)
def test_slots_and_means_at_once(dtype, tokens, width, kind, seed):
    """Runs begin and end within a tile of 16 tokens, go on over several, and are whole rows."""
    x, marked = strided(values(seed, 2, tokens, width).to(dtype), kind), runs(seed, 2, tokens)
    found = launched("mark_pack", x, marked, tokens, None, True)
    wanted, slots = kernel_reference("mark_pack")(x.double(), marked, tokens, None, True)
    assert torch.equal(found[1], slots)
    torch.testing.assert_close(found[0].double(), wanted, rtol=EPSILON[dtype], atol=2e-6)
    assert torch.equal(found[0][slots >= -1], wanted[slots >= -1].to(dtype))


def test_a_run_takes_nothing_from_tokens_outside_of_it():
    x = torch.full((1, 40, 4), torch.inf)
    marked = torch.zeros(1, 40, dtype=torch.bool)
    marked[0, 10:37], x[0, 10:37] = True, 1.0
    tokens, slots = launched("mark_pack", x, marked, 40, None, True)
    assert torch.equal(tokens[slots < -1], torch.ones(1, 4))


@settings(max_examples=25)
@given(
    DTYPES,
    st.sampled_from([(8, 3, 1), (8, 4, 0), (80, 16, 40), (6, 1, 4)]),
    st.booleans(),
    st.sampled_from([(2,), (1,), (2, 3), (2, 1)]),
    st.sampled_from([(), (1,), (2,)]),
    st.booleans(),
    KINDS,
    SEEDS,
)
def test_pairs_are_turned_as_in_float64(dtype, head, neighbours, rows, own, whole, kind, seed):
    """Positions of rows or heads, in fractions or not; frequencies of rows or of all."""
    width, pairs, start = head
    x = strided(values(seed, 2, 3, 5, width).to(dtype), kind)
    here, there = (values(seed + n, *rows, 5) * 50 for n in (1, 2))
    here = here.round().long() if whole else here
    frequencies = values(seed + 3, *own, pairs).abs()
    args = (x, here, there, frequencies, start, neighbours)
    found = launched("turn_pairs", *args)
    assert found.dtype == dtype
    wanted = _turned(x.double(), here.double() - there.double(), frequencies.double(), start, neighbours)
    rounding = 8 * 150 * 2**-23 + EPSILON[dtype] * wanted.abs()
    assert ((found.double() - wanted).abs() <= rounding).all()
    assert torch.equal(found[..., :start], x[..., :start])
    assert torch.equal(found[..., start + 2 * pairs :], x[..., start + 2 * pairs :])


@settings(max_examples=25)
@given(
    DTYPES,
    st.sampled_from([(8, 3, 1), (128, 64, 0), (80, 16, 40), (512, 256, 0)]),
    st.booleans(),
    st.sampled_from([(2, 1), (1, 1), (2, 3), (1, 3)]),
    st.sampled_from([(2,), (1,), (2, 3), (2, 1, "several")]),
    st.sampled_from([1, 3, 4]),
    KINDS,
    SEEDS,
)
def test_pairs_of_several_coordinates_are_turned_as_in_float64(
    dtype, head, neighbours, rows, others, several, kind, seed
):
    """Sections side by side, pairs in turn, or any order; to as many coordinates, or one position for all of them."""
    width, pairs, start = head
    x = strided(values(seed, 2, 3, 5, width).to(dtype), kind)
    here = strided((values(seed + 1, *rows, 5, several) * 50).round().long(), kind)
    of_all = others[-1] != "several"
    there = values(seed + 2, *others, 5) * 50 if of_all else values(seed + 2, *others[:-1], 5, several) * 50
    places = torch.arange(pairs)
    coordinate = [places * several // pairs, places % several, places.flip(0) * 7 % several][seed % 3].tolist()
    frequencies = values(seed + 3, pairs).abs()
    found = launched("turn_pairs", x, here, there, frequencies, start, neighbours, coordinate)
    assert found.dtype == dtype
    there = there if there.dim() != 2 else there[:, None]
    back = here.double()[..., coordinate] - (there[..., None] if of_all else there[..., coordinate]).double()
    wanted = _turned(x.double(), back, frequencies.double(), start, neighbours)
    rounding = 8 * 150 * 2**-23 + EPSILON[dtype] * wanted.abs()
    assert ((found.double() - wanted).abs() <= rounding).all()
    assert torch.equal(found[..., :start], x[..., :start])
    assert torch.equal(found[..., start + 2 * pairs :], x[..., start + 2 * pairs :])


def test_more_coordinates_than_two_bits_tell_are_left_to_the_reference():
    x, positions, frequencies = values(0, 1, 2, 3, 10), torch.ones(1, 1, 3, 5), torch.ones(5)
    assert kernel_fault("turn_pairs", (x, positions, positions, frequencies, 0, False, [0, 1, 2, 3, 3])) is None
    found = kernel_fault("turn_pairs", (x, positions, positions, frequencies, 0, False, [0, 1, 2, 3, 4]))
    assert found == "tokens of 5 positions; at most 4"


@pytest.mark.parametrize("pairs", [1, 30, 31, 64, 256])
def test_words_of_coordinates_are_never_negative(pairs):
    """Inductor hands negative numbers that need 64 bits over as 32."""
    words = triton_turn_pairs._packed([3] * pairs)
    assert all(0 <= word < 1 << 60 for word in words.values())
    assert sum(word.bit_count() for word in words.values()) == 2 * pairs


def _turned(x, back, frequencies, start, neighbours):
    """By complex numbers, in float64; back by one position of each token, or by one of each of its pairs."""
    back = back[:, None] if back.dim() == 2 else back
    pairs = frequencies.shape[-1]
    angles = -(back if back.dim() == 4 else back[..., None]) * frequencies.reshape(-1, 1, 1, pairs)
    places = torch.arange(pairs)
    one, two = (start + 2 * places, start + 2 * places + 1) if neighbours else (start + places, start + places + pairs)
    turned = torch.complex(x[..., one], x[..., two]) * torch.polar(torch.ones_like(angles), angles)
    out = x.clone()
    out[..., one], out[..., two] = turned.real, turned.imag
    return out


@settings(max_examples=20)
@given(
    DTYPES,
    DTYPES,
    st.sampled_from([(8, 8), (8, 6), (80, 32), (6, 2)]),
    st.booleans(),
    st.sampled_from([(2, 3), (1, 1), (1, 3), (2, 1)]),
    KINDS,
    SEEDS,
)
def test_keys_are_turned_back_as_in_float64(dtype, tables, head, neighbours, shape, kind, seed):
    width, turned = head
    keys = strided(values(seed, 2, 3, 5, width).to(dtype), kind)
    angles = values(seed + 1, *shape, 5, turned) * 9
    cos, sin = (strided((wave * 1.2).to(tables), kind) for wave in (angles.cos(), angles.sin()))
    found = launched("unturn_keys", keys, cos, sin, neighbours)
    assert found.dtype == torch.float32
    wanted = _unturned(keys.double(), cos.double(), sin.double(), neighbours)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def _unturned(keys, cos, sin, neighbours):
    width = cos.shape[-1]
    columns = torch.arange(width)
    first = columns % 2 == 0 if neighbours else columns < width // 2
    step = 1 if neighbours else width // 2
    other = keys[..., torch.where(first, columns + step, columns - step)] * torch.where(first, -1.0, 1.0)
    turned = (keys[..., :width] * cos - other * sin) / (cos**2 + sin**2)
    return torch.cat([turned, keys[..., width:]], -1)


@pytest.mark.parametrize("width", [32, 64, 80, 128, 256])
def test_heads_of_all_widths(width):
    x = values(0, 1, 2, 3, width)
    here, there = torch.arange(3)[None], torch.arange(3)[None] * 100
    args = (x, here, there, values(1, width // 2).abs(), 0, False)
    torch.testing.assert_close(launched("turn_pairs", *args), reference_of("turn_pairs")(*args), rtol=1e-4, atol=1e-4)
    args = (x, values(2, 1, 1, 3, width).cos(), values(3, 1, 1, 3, width).cos() + 2, True)
    torch.testing.assert_close(launched("unturn_keys", *args), reference_of("unturn_keys")(*args), rtol=1e-5, atol=1e-5)
