"""The arithmetic of rule files is exact, and nothing but arithmetic."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokcompile.errors import RuleError
from tokcompile.expr import MAX_LENGTH, evaluate, names_in, substitute

NAMES = {"keep": 192, "alpha": Fraction(1, 10), "vision.depth": 24}
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv}


def _divide(left: int | Fraction, right: int | Fraction) -> Fraction:
    return Fraction(left) / Fraction(right)


def _leaves() -> st.SearchStrategy[tuple[str, int | Fraction]]:
    integers = st.integers(0, 9999).map(lambda n: (str(n), n))
    decimals = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda p: f"{p[0]}.{p[1]:02d}")
    return st.one_of(
        integers,
        decimals.map(lambda text: (text, Fraction(text))),
        st.sampled_from(sorted(NAMES)).map(lambda name: (name, NAMES[name])),
    )


def _grow(child: st.SearchStrategy) -> st.SearchStrategy:
    binary = st.tuples(child, st.sampled_from([*OPERATORS, "/"]), child).map(
        lambda t: (
            f"({t[0][0]} {t[1]} {t[2][0]})",
            None
            if None in (t[0][1], t[2][1]) or (t[2][1] == 0 and "/" in t[1])
            else (OPERATORS.get(t[1], _divide))(t[0][1], t[2][1]),
        )
    )
    minus = child.map(lambda c: (f"-{c[0]}", None if c[1] is None else -c[1]))
    pair = st.tuples(st.sampled_from([min, max]), child, child).map(
        lambda t: (
            f"{t[0].__name__}({t[1][0]}, {t[2][0]})",
            None if None in (t[1][1], t[2][1]) else t[0](t[1][1], t[2][1]),
        )
    )
    return st.one_of(binary, minus, pair)


@given(st.recursive(_leaves(), _grow, max_leaves=8))
def test_agrees_with_exact_arithmetic(case: tuple[str, int | Fraction | None]) -> None:
    text, expected = case
    if len(text) > MAX_LENGTH or expected is None:
        return
    value = evaluate(text, NAMES)
    assert value == expected
    assert type(value) is type(expected)


@given(st.text(max_size=60))
def test_any_text_is_a_number_or_a_clear_error(text: str) -> None:
    try:
        value = evaluate(text, NAMES)
    except RuleError as error:
        assert "column" in error.cause
        assert error.remedy
    else:
        assert isinstance(value, int | Fraction)


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os')",
        "().__class__",
        "9**9**9",
        "9 ** 9",
        "(" * 100 + "1" + ")" * 99,
        "-" * 150 + "1",
        "+".join(["1"] * 200),
        "keep.__class__.__mro__",
        "[1 for x in y]",
        "lambda: 1",
        "min",
        "min()",
        "min(*keep)",
        "max(1, key=2)",
        "eval(1)",
        "keep.real(1)",
        "1e99999",
        "0x10",
        "1_000",
        "1 if keep else 2",
        "keep % 2",
        "True",
        "'text'",
        "1j",
        "",
        "   ",
        "a := 1",
        "1\n2",
        "𝟏 + 1",
    ],
)
def test_refuses_everything_else(source: str) -> None:
    with pytest.raises(RuleError, match="column"):
        evaluate(source, NAMES)


@pytest.mark.parametrize(
    ("source", "piece", "column"),
    [
        ("keep + beta", "beta", 8),
        ("  kep * 2", "kep", 3),
        ("1 / (keep - 192)", "divides by zero", 1),
        ("keep ** 2", "**", 5),
        ("1 + isqrt(0 - 1)", "square root of -1", 4 + 1),
        ("isqrt(4, 9)", "square root of 4, 9", 1),
    ],
)
def test_an_error_names_the_piece_and_its_column(source: str, piece: str, column: int) -> None:
    with pytest.raises(RuleError) as caught:
        evaluate(source, NAMES)
    assert piece in caught.value.cause
    assert f"column {column}" in caught.value.cause


@given(st.fractions(0, 10**12))
def test_isqrt_is_the_largest_whole_number_whose_square_fits(value: Fraction) -> None:
    root = evaluate("isqrt(keep)", {"keep": value})
    assert type(root) is int and root * root <= value < (root + 1) * (root + 1)


def test_a_misspelt_name_gets_the_nearest_one() -> None:
    with pytest.raises(RuleError, match="did you mean 'keep'"):
        evaluate("kep * 2", NAMES)


def test_substitute_keeps_the_type_of_a_whole_value() -> None:
    assert substitute("${keep * alpha / 5}", NAMES) == Fraction(192, 50)
    assert substitute("${keep // 2}", NAMES) == 96
    assert substitute("${among}", {"among": "text"}) == "text"
    assert substitute("no expression", NAMES) == "no expression"


def test_substitute_writes_whole_numbers_as_integers() -> None:
    assert substitute("decoder.${keep / 2}.input", NAMES) == "decoder.96.input"
    assert substitute("vision.${vision.depth - 1}.attention", NAMES) == "vision.23.attention"


def test_words_do_not_take_part_in_arithmetic() -> None:
    with pytest.raises(RuleError, match="not a number"):
        substitute("${among + 1}", {"among": "text"})


def test_names_in() -> None:
    assert names_in("a.${x + vision.depth}.${min(y, 2)}") == {"x", "y", "vision.depth"}
    assert names_in("nothing") == set()


@pytest.mark.parametrize("text", ["${keep", "a.${b.${c}}", "${{1}}"])
def test_an_open_brace_is_an_error(text: str) -> None:
    with pytest.raises(RuleError):
        names_in(text)
