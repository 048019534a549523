"""Which rotary bases fit a context length, a depth and a float format: four bounds, as pure formulas.

Source: "Rotary Positional Embeddings as Phase Modulation: Theoretical Bounds on the RoPE Base for Long-Context
Transformers" (2026), arXiv 2602.10959. A rotary table turns pair i of a head by position * base^(-2i / d); the slowest
of these frequencies is theta_min = base^(-(d - 2) / d), which the paper writes as 1 / base in every bound. With a `d`,
functions keep it: where the paper has a base of X, they have X^(d / (d - 2)).

L is the largest position, in tokens; N the number of layers that turn by the tables; eps the coherence, a cosine, that
the slowest frequency must keep; all of them plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tokcompile.errors import TokredError

PAPER = "arXiv 2602.10959"
COHERENCE = 0.95
"""The paper's eps."""
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "tf32": 2.0**-10, "bfloat16": 2.0**-7}
"""Machine epsilon by float format: the step from 1 to the next number."""
VERDICTS = ("ok", "below_depth", "below_dc", "aliased", "above_precision", "wall")


@dataclass(frozen=True)
class Bound:
    """One of the four bounds.

    Attributes:
        formula: what the base must satisfy, as text.
        caveat: what the bound does not say.
    """

    name: str
    formula: str
    caveat: str
    source: str = PAPER


ALIASING = Bound(
    "aliasing",
    "base > L / (2 pi)",
    "the slowest frequency coming round does not make two positions alike: the other frequencies still differ",
)
DC = Bound(
    "dc",
    "base >= L / arccos(eps)",
    "eps is a choice (0.95 in the paper): how much of the slowest frequency must be left at the largest position",
)
DEPTH = Bound(
    "depth",
    "base >= L / arccos(eps^(1/N))",
    "takes the turns of N layers for one product, a modelling assumption that readers contest",
)
PRECISION = Bound(
    "precision",
    "base < 1 / eps_mach",
    "models a phase that is added up; position * theta itself loses neighbouring positions beyond 2^24 in float32, "
    "whatever the base",
)
BOUNDS = (ALIASING, DC, DEPTH, PRECISION)


def theta_min(base: float, d: int) -> float:
    """The slowest frequency of a base, in radians a token: base^(-(d - 2) / d)."""
    return float(base) ** (-(_pairs(d) - 2) / d)


def base_of(slowest: float, d: int) -> float:
    """The base whose slowest frequency is given: slowest^(-d / (d - 2)); the base itself where nothing is scaled."""
    if not slowest > 0:
        raise TokredError("a frequency is a positive number", found=repr(slowest))
    return float(slowest) ** (-d / (_pairs(d) - 2))


def aliasing(length: float, d: int | None = None) -> float:
    """Least base by which the slowest frequency does not come round: L / (2 pi); with d, exactly."""
    return _exact(_length(length) / (2 * math.pi), d)


def dc(length: float, eps: float = COHERENCE, d: int | None = None) -> float:
    """Least base by which cos(L theta_min) >= eps: L / arccos(eps); with d, exactly."""
    return _exact(_length(length) / coherent_angle(eps), d)


def depth(length: float, layers: int, eps: float = COHERENCE, d: int | None = None) -> float:
    """Least base by which cos(L theta_min)^N >= eps: L / arccos(eps^(1/N)); with d, exactly."""
    return _exact(_length(length) / coherent_angle(eps, layers), d)


def precision(dtype: str, d: int | None = None) -> float:
    """The base that must not be reached: 1 / eps_mach of the dtype that angles are computed in; with d, exactly."""
    return _exact(1 / epsilon(dtype), d)


def epsilon(dtype: str) -> float:
    """Machine epsilon of a float format, by name.

    Raises:
        TokredError: there is none of that name.
    """
    if dtype not in EPSILON:
        raise TokredError(f"no machine epsilon is known for '{dtype}'", remedy=f"known: {', '.join(EPSILON)}")
    return EPSILON[dtype]


def coherent_angle(eps: float = COHERENCE, layers: int = 1) -> float:
    """arccos(eps^(1/N)) in radians: how far the slowest frequency may turn.

    Raises:
        TokredError: eps is not between 0 and 1, or N is below 1.
    """
    if not 0 < eps < 1:
        raise TokredError("eps is a coherence between 0 and 1, both excluded", found=repr(eps), remedy="eps=0.95")
    if layers < 1:
        raise TokredError("the depth bound needs a layer that turns its queries", found=f"N = {layers}")
    # arccos near 1 loses half of its digits: 2 asin(sqrt((1 - x) / 2)), with 1 - x from the exponent, does not.
    return 2 * math.asin(math.sqrt(-math.expm1(math.log(eps) / layers) / 2))


def wall(dtype: str, layers: int, eps: float = COHERENCE) -> float:
    """The length beyond which no base is left between depth and precision bound: arccos(eps^(1/N)) / eps_mach."""
    return coherent_angle(eps, layers) / epsilon(dtype)


def longest(base: float, layers: int, eps: float = COHERENCE, d: int | None = None) -> dict[str, float]:
    """Largest L by bound (`aliasing`, `dc`, `depth`) that a base is enough for: the bounds solved for L."""
    period = 1 / theta_min(base, d) if d is not None else float(base)
    return {
        "aliasing": 2 * math.pi * period,
        "dc": coherent_angle(eps) * period,
        "depth": coherent_angle(eps, layers) * period,
    }


@dataclass(frozen=True)
class Verdict:
    """The four bounds for one base.

    Attributes:
        word: one of `VERDICTS`; `wall` where no base at all satisfies the four.
        bounds: base by bound: least ones, and for `precision` the one that must not be reached.
        margins: log10 of how far the base is on the right side of each bound; negative where it is not.
        longest: largest L by bound for this base; for `precision` the length beyond which no base is left.
        interval: least base, and the one that must not be reached; empty where the first is not below the second.
    """

    word: str
    base: float
    bounds: dict[str, float]
    margins: dict[str, float]
    longest: dict[str, float]
    interval: tuple[float, float]


def judge(
    base: float, length: float, layers: int, dtype: str, *, eps: float = COHERENCE, d: int | None = None
) -> Verdict:
    """Hold one base against the four bounds.

    Args:
        base: of the tables, or what `base_of` gives for their slowest frequency.
        length: L, the largest position.
        layers: N, those that turn queries by the tables.
        dtype: that angles are computed in: a key of `EPSILON`.
        eps: coherence.
        d: rotary dimension for exact bounds; None for the paper's.

    Raises:
        TokredError: eps, L, N, d or the dtype is out of range.
    """
    if not base > 0:
        raise TokredError("a rotary base is a positive number", found=repr(base))
    least = {"aliasing": aliasing(length, d), "dc": dc(length, eps, d), "depth": depth(length, layers, eps, d)}
    ceiling = precision(dtype, d)
    margins = {name: math.log10(base / bound) for name, bound in least.items()}
    margins["precision"] = math.log10(ceiling / base)
    limits = longest(base, layers, eps, d) | {"precision": wall(dtype, layers, eps)}
    interval = (max(least.values()), ceiling)
    word = _word(base, least, interval)
    return Verdict(word, float(base), {**least, "precision": ceiling}, margins, limits, interval)


def _word(base: float, least: dict[str, float], interval: tuple[float, float]) -> str:
    if interval[0] >= interval[1]:
        return "wall"
    if base >= interval[1]:
        return "above_precision"
    if base <= least["aliasing"]:
        return "aliased"
    if base < least["dc"]:
        return "below_dc"
    return "below_depth" if base < least["depth"] else "ok"


def ladder(base: float, d: int) -> list[float]:
    """All d / 2 frequencies of a base, in radians a token, from 1 down."""
    return [float(base) ** (-2 * i / d) for i in range(_pairs(d) // 2)]


def halves(frequencies: Sequence[float]) -> int:
    """How many frequencies a table has when each may stand in it more than once: repeated whole, or each in turn."""
    found = list(frequencies)
    while len(found) > 1 and len(found) % 2 == 0:
        half = len(found) // 2
        if found[:half] != found[half:] and found[::2] != found[1::2]:
            break
        found = found[:half] if found[:half] == found[half:] else found[::2]
    return len(found)


def _length(length: float) -> float:
    if not length > 0:
        raise TokredError("L is the largest position, and above 0", found=repr(length), remedy="--context N")
    return float(length)


def _pairs(d: int) -> int:
    if d < 4 or d % 2:
        raise TokredError("a rotary dimension is even, and 4 or more where the base matters", found=f"d = {d}")
    return d


def _exact(bound: float, d: int | None) -> float:
    return bound if d is None else bound ** (d / (_pairs(d) - 2))
