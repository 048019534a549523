"""Budgets are exact."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tokcompile.budget import Budget, round_ratio
from tokcompile.errors import RuleError

EXACT = {
    "floor": math.floor,
    "ceil": math.ceil,
    "half_even": round,
    "half_up": lambda x: math.floor(x + Fraction(1, 2)),
}


@given(st.integers(0, 5000), st.integers(1, 700), st.sampled_from(sorted(EXACT)))
def test_rounding_equals_that_of_fractions(numerator: int, denominator: int, rounding: str) -> None:
    assert round_ratio(numerator, denominator, rounding) == EXACT[rounding](Fraction(numerator, denominator))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        (192, 192),
        ("192", 192),
        (0.5, Fraction(1, 2)),
        (0.3, Fraction(3, 10)),
        (1 / 3, Fraction(1, 3)),
        (0.3333, Fraction(3333, 10000)),
        (1 / 9, Fraction(1, 9)),
        ("1/3", Fraction(1, 3)),
        ("33%", Fraction(33, 100)),
        ("12.5 %", Fraction(1, 8)),
        ("0.25", Fraction(1, 4)),
        (1.0, Fraction(1)),
        (1, 1),
    ],
)
def test_parse(written: object, value: int | Fraction) -> None:
    budget = Budget.parse(written)
    assert budget.value == value
    assert type(budget.value) is type(value)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "written", [0, -1, 0.0, 1.5, "3/2", "0/3", "1/0", "101%", "many", True, None, float("nan"), [1]]
)
def test_parse_refuses(written: object) -> None:
    with pytest.raises(RuleError, match="not a number of tokens") as caught:
        Budget.parse(written)
    assert "1/3" in caught.value.remedy


@pytest.mark.parametrize(
    ("written", "n", "rounding", "count"),
    [
        ("1/3", 576, "floor", 192),
        (0.5, 575, "half_even", 288),
        (0.5, 577, "half_even", 288),
        (0.25, 576, "half_even", 144),
        (0.5, 575, "floor", 287),
        (700, 576, "floor", 576),
        (0.001, 576, "floor", 1),
        (1.0, 576, "floor", 576),
    ],
)
def test_count(written: object, n: int, rounding: str, count: int) -> None:
    assert Budget.parse(written).count(n, rounding) == count


def test_zero_only_where_allowed() -> None:
    assert Budget.parse(0.001).count(10) == 1
    assert Budget.parse(0.001).count(10, allow_zero=True) == 0
    assert Budget.parse(5).count(0) == 0


@pytest.mark.parametrize("rounding", sorted(EXACT))
def test_a_symbolic_length_stays_symbolic(rounding: str) -> None:
    shapes = ShapeEnv()
    n = shapes.create_unbacked_symint()
    torch._check(n >= 2)
    count = Budget.parse("1/3").count(n, rounding)
    assert isinstance(count, torch.SymInt)
    expression = count.node.expr
    for value in (2, 17, 575, 576):
        expected = max(1, EXACT[rounding](Fraction(value, 3)))
        assert int(expression.subs({n.node.expr: value})) == expected
