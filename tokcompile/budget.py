"""How many tokens are kept: counts and exact ratios, in integer arithmetic only.

`int(n * 0.3)` is frozen by torch.export and can be one token off; `n * p // q` is neither, and works as it stands on a
symbolic length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from tokcompile.errors import RuleError, known

ROUNDINGS = ("floor", "half_even", "half_up", "ceil")
ALLOWED = 'a whole number of tokens (192), or a ratio above 0 and up to 1 (0.5, "1/3", "33%")'

_RATIO = re.compile(r"([0-9]{1,9})\s*/\s*([0-9]{1,9})")
_PERCENT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%")
_DECIMAL = re.compile(r"[0-9]{0,9}\.[0-9]{1,18}")


def round_ratio(numerator: Any, denominator: int, rounding: str) -> Any:
    """Return numerator / denominator as a whole number; the numerator is an int or a symbolic int, not negative.

    Args:
        rounding: `floor`, `ceil`, `half_up`, or `half_even` (Python's own `round`).
    """
    if rounding == "floor":
        return numerator // denominator
    if rounding == "ceil":
        return (numerator + denominator - 1) // denominator
    twice = 2 * denominator
    up = (2 * numerator + denominator) // twice
    if rounding == "half_up":
        return up
    if rounding != "half_even":
        raise RuleError(f"unknown rounding '{rounding}'", remedy=known(rounding, ROUNDINGS))
    # A tie is a remainder of 0; written without a comparison, which would put a guard on a symbolic length.
    tie = (twice - 1 - (2 * numerator + denominator) % twice) // (twice - 1)
    return up - tie * (up % 2)


def clamp(count: Any, n: Any, allow_zero: bool = False) -> Any:
    """Keep a count between 1 (0 where allowed) and n; n and the count may be symbolic."""
    low = 0 if allow_zero else 1
    if isinstance(count, int) and isinstance(n, int):
        return min(max(count, min(low, n)), n)
    import torch  # only symbolic lengths need it, and the command line starts faster without

    return torch.sym_min(torch.sym_max(count, low), n)


@dataclass(frozen=True)
class Budget:
    """A number of tokens to keep: a count, or an exact share of those there are.

    Attributes:
        value: an int is a count (1 or more); a Fraction is a ratio, above 0 and up to 1.
    """

    value: int | Fraction

    @classmethod
    def parse(cls, value: object) -> Budget:
        """Read what a user wrote: an int, a decimal, a Fraction, `"192"`, `"1/3"` or `"33%"`."""
        number = _number(value)
        if number is None or number <= 0 or (isinstance(number, Fraction) and number > 1):
            raise RuleError("not a number of tokens", found=repr(value), remedy=ALLOWED)
        return cls(number)

    @property
    def is_ratio(self) -> bool:
        """Whether the budget is a share, and not a count."""
        return isinstance(self.value, Fraction)

    def count(self, n: Any, rounding: str = "floor", allow_zero: bool = False) -> Any:
        """Return how many of n tokens are kept: at most n, at least 1 (0 where allowed). n may be symbolic."""
        if not isinstance(self.value, Fraction):
            return clamp(self.value, n, allow_zero)
        if self.value == 1:
            return n
        return clamp(round_ratio(n * self.value.numerator, self.value.denominator, rounding), n, allow_zero)

    def __str__(self) -> str:
        whole = self.is_ratio and self.value.denominator == 1
        return "1/1" if whole else str(self.value)


def _number(value: object) -> int | Fraction | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | Fraction):
        return value
    if isinstance(value, float):
        return _from_float(value)
    if hasattr(value, "__index__"):
        return int(value.__index__())
    return _from_text(value.strip()) if isinstance(value, str) else None


def _from_float(value: float) -> Fraction | None:
    if not 0 < value <= 1:  # also refuses nan
        return None
    # 1/3 computed in Python arrives as 0.333…; the user meant the third, and 0.3333 stays what it says.
    near = Fraction(value).limit_denominator(1000)
    return near if abs(near - Fraction(value)) <= Fraction(1, 10**12) else Fraction(str(value))


def _from_text(text: str) -> int | Fraction | None:
    if re.fullmatch(r"[0-9]{1,9}", text):
        return int(text)
    ratio = _RATIO.fullmatch(text)
    if ratio and int(ratio[2]):
        return Fraction(int(ratio[1]), int(ratio[2]))
    percent = _PERCENT.fullmatch(text)
    if percent:
        return Fraction(percent[1]) / 100
    return Fraction(text) if _DECIMAL.fullmatch(text) else None
