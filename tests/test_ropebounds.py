"""The bounds on a rotary base: constants, inverses and limits of the method's spec."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokcompile.errors import TokredError
from tokcompile.rope import ropebounds

LENGTHS = st.floats(1, 1e8)
LAYERS = st.integers(1, 200)
COHERENCES = st.floats(0.05, 0.999)
FLOATS = {"float32": (torch.float32, 23), "bfloat16": (torch.bfloat16, 7), "float16": (torch.float16, 10)}


def near(value: float, digits: int = 4) -> object:
    return pytest.approx(value, rel=0.5 * 10.0 ** (1 - digits))


@pytest.mark.parametrize(
    ("length", "layers", "aliasing", "dc", "depth"),
    [
        (4096, 32, 651.9, 1.290e4, 7.236e4),
        (8192, 32, 1304, 2.580e4, 1.447e5),
        (8192, 80, 1304, 2.580e4, 2.288e5),
        (32768, 32, 5215, 1.032e5, 5.789e5),
        (32768, 28, 5215, 1.032e5, 5.415e5),
        (131072, 32, 2.086e4, 4.127e5, 2.316e6),
        (131072, 60, 2.086e4, 4.127e5, 3.170e6),
        (131072, 80, 2.086e4, 4.127e5, 3.661e6),
        (1_048_576, 32, 1.669e5, 3.302e6, 1.852e7),
    ],
)
def test_the_tables_values(length: int, layers: int, aliasing: float, dc: float, depth: float) -> None:
    assert ropebounds.aliasing(length) == near(aliasing)
    assert ropebounds.dc(length) == near(dc)
    assert ropebounds.depth(length, layers) == near(depth)


def test_constants() -> None:
    assert ropebounds.coherent_angle(0.95) == near(0.317560, 6)
    assert 1 / ropebounds.coherent_angle(0.95) == near(3.1490, 5)
    assert ropebounds.coherent_angle(0.95, 32) == near(0.0566049, 6)
    assert ropebounds.coherent_angle(0.95, 80) == near(0.0358058, 6)
    ceilings = {"float32": 8_388_608, "float16": 1_024, "tf32": 1_024, "bfloat16": 128, "float64": 2**52}
    assert {name: ropebounds.precision(name) for name in ceilings} == ceilings


@pytest.mark.parametrize(("layers", "wall"), [(32, 474_837), (80, 300_361), (1, 2_663_890)])
def test_the_precision_wall(layers: int, wall: float) -> None:
    assert ropebounds.wall("float32", layers) == near(wall, 6)
    assert ropebounds.depth(ropebounds.wall("float32", layers), layers) == near(8_388_608, 9)


def test_exact_values_keep_the_dimension() -> None:
    assert ropebounds.aliasing(131072, d=128) == near(24_428)
    assert ropebounds.precision("float32", d=128) == near(1.08e7, 3)


@pytest.mark.parametrize(
    ("base", "length", "layers", "word"),
    [
        (1e4, 4096, 32, "below_dc"),
        (500_000, 8192, 32, "ok"),
        (5e5, 131072, 32, "below_depth"),
        (4.13e6, 131072, 32, "ok"),
        (1e6, 32768, 32, "ok"),
        (1e7, 1_000_000, 32, "wall"),
        (600, 4096, 32, "aliased"),
        (1e7, 4096, 32, "above_precision"),
    ],
)
def test_verdicts(base: float, length: int, layers: int, word: str) -> None:
    found = ropebounds.judge(base, length, layers, "float32")
    assert found.word == word
    assert (found.interval[0] >= found.interval[1]) == (word == "wall")
    bad = {name for name, margin in found.margins.items() if margin < 0}
    assert (not bad) == (word == "ok") or word == "wall"


def test_llama3_scaling_in_the_effective_base() -> None:
    """A slowest frequency divided by s is a base times s^(d / (d - 2))."""
    slowest = ropebounds.theta_min(5e5, 128) / 8
    assert ropebounds.base_of(slowest, 128) == near(4.13e6, 3)
    assert ropebounds.base_of(slowest, 128) == near(5e5 * 8 ** (128 / 126), 12)


@given(base=st.floats(100, 1e9), d=st.integers(2, 128).map(lambda n: 2 * n))
def test_the_base_comes_back(base: float, d: int) -> None:
    assert ropebounds.base_of(ropebounds.theta_min(base, d), d) == pytest.approx(base, rel=1e-9)
    assert ropebounds.ladder(base, d)[-1] == pytest.approx(ropebounds.theta_min(base, d), rel=1e-9)


@given(length=LENGTHS, layers=LAYERS, eps=COHERENCES, exact=st.sampled_from([None, 8, 128]))
def test_bounds_solved_for_the_length(length: float, layers: int, eps: float, exact: int | None) -> None:
    limits = {
        "aliasing": ropebounds.aliasing(length, exact),
        "dc": ropebounds.dc(length, eps, exact),
        "depth": ropebounds.depth(length, layers, eps, exact),
    }
    for name, base in limits.items():
        assert ropebounds.longest(base, layers, eps, exact)[name] == pytest.approx(length, rel=1e-9)


@given(length=st.floats(1, 1e6), layers=LAYERS, eps=COHERENCES)
def test_the_coherence_at_the_depth_bound(length: float, layers: int, eps: float) -> None:
    base = ropebounds.depth(length, layers, eps)
    assert math.cos(length / base) ** layers == pytest.approx(eps, abs=1e-9)


@given(length=LENGTHS, layers=LAYERS, eps=COHERENCES)
def test_the_order_of_the_bounds(length: float, layers: int, eps: float) -> None:
    aliasing, dc, depth = ropebounds.aliasing(length), ropebounds.dc(length, eps), ropebounds.depth(length, layers, eps)
    assert aliasing < dc <= depth * (1 + 1e-12)
    assert ropebounds.depth(length, 1, eps) == dc
    assert depth < ropebounds.depth(length * 1.01, layers, eps)
    assert depth < ropebounds.depth(length, layers + 1, eps)
    assert depth < ropebounds.depth(length, layers, min(0.9999, eps * 1.01))


def test_the_approximation_of_the_depth_bound() -> None:
    assert ropebounds.coherent_angle(0.95, 80) == pytest.approx(math.sqrt(-2 * math.log(0.95) / 80), rel=1e-3)


def test_full_coherence_needs_an_infinite_base() -> None:
    bases = [ropebounds.dc(4096, 1 - 10.0**-n) for n in range(2, 15)]
    assert bases == sorted(bases) and bases[-1] > 1e10


@pytest.mark.parametrize("name", FLOATS)
def test_the_step_of_a_float_format(name: str) -> None:
    dtype, bits = FLOATS[name]
    one = torch.ones((), dtype=dtype)
    assert ropebounds.epsilon(name) == torch.finfo(dtype).eps == 2.0**-bits
    assert one + torch.tensor(2.0**-bits, dtype=dtype) != one
    assert one + torch.tensor(2.0 ** -(bits + 1), dtype=dtype) == one


def test_a_single_position() -> None:
    found = ropebounds.judge(10_000, 1, 32, "float32")
    assert found.word == "ok" and all(margin > 0 for margin in found.margins.values())


def test_a_base_is_a_number_of_either_kind() -> None:
    assert ropebounds.judge(10_000, 4096, 32, "float32") == ropebounds.judge(10_000.0, 4096.0, 32, "float32")


@pytest.mark.parametrize("eps", [0, 1, -0.1, 1.5, float("nan")])
def test_a_coherence_out_of_range(eps: float) -> None:
    with pytest.raises(TokredError, match="between 0 and 1"):
        ropebounds.dc(4096, eps)


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda: ropebounds.depth(4096, 0), "N = 0"),
        (lambda: ropebounds.aliasing(0), "largest position"),
        (lambda: ropebounds.precision("int8"), "no machine epsilon"),
        (lambda: ropebounds.theta_min(1e4, 2), "4 or more"),
        (lambda: ropebounds.base_of(0.0, 128), "positive"),
        (lambda: ropebounds.judge(-1, 4096, 32, "float32"), "positive"),
    ],
)
def test_values_out_of_range(call: object, cause: str) -> None:
    with pytest.raises(TokredError, match=cause):
        call()


@pytest.mark.parametrize("repeat", [lambda f: f, lambda f: f + f, lambda f: [x for x in f for _ in (0, 1)]])
def test_frequencies_that_stand_twice(repeat: object) -> None:
    found = repeat(ropebounds.ladder(10_000, 16))
    assert ropebounds.halves(found) == 8
