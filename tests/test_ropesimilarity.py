"""The second opinion on a rotary base: the sum of cosines against loops, and the paper's table."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokcompile.errors import TokredError
from tokcompile.rope import ropesimilarity
from tokcompile.rope.ropebounds import ladder


@settings(max_examples=25)
@given(st.floats(2, 1e6), st.sampled_from([4, 8, 64]), st.integers(0, 400))
def test_the_reach_is_that_of_a_loop(base: float, d: int, limit: int) -> None:
    wanted = limit
    for m in range(limit + 1):
        if math.fsum(math.cos(m * base ** (-2 * i / d)) for i in range(d // 2)) < -1e-9:
            wanted = m - 1
            break
    assert ropesimilarity.reach(ladder(base, d), limit) == wanted


def test_the_reach_is_found_beyond_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ropesimilarity.reach(ladder(1e4, 128), 5000)
    monkeypatch.setattr(ropesimilarity, "_BLOCK", 17)
    assert ropesimilarity.reach(ladder(1e4, 128), 5000) == whole < 5000


@pytest.mark.parametrize(
    ("length", "paper"), [(1024, 4.3e3), (2048, 1.6e4), (4096, 2.7e4), (8192, 8.4e4), (16384, 3.1e5), (32768, 6.4e5)]
)
def test_the_papers_table_within_a_factor_of_two(length: int, paper: float) -> None:
    """Men et al., table 2, for a head of 128."""
    found = ropesimilarity.least_base(length, 128)
    assert paper / 2 < found < paper * 2
    assert ropesimilarity.reach(ladder(found * 1.001, 128), length // 2) == length // 2


@pytest.mark.parametrize("length", [0, -5])
def test_no_length(length: int) -> None:
    with pytest.raises(TokredError, match="above 0"):
        ropesimilarity.least_base(length, 64)
