"""lint: what may be wrong with rotary tables for a length, and with a rule. Advice alone: nothing is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from tokcompile.binding import RuleInstance
from tokcompile.capturing.buffers import Values
from tokcompile.capturing.imagesizes import packed, precompute
from tokcompile.errors import TokredError
from tokcompile.modelsource import Source, capture_at
from tokcompile.program import Program
from tokcompile.rope import ropebounds, ropesimilarity
from tokcompile.rope.ropebounds import BOUNDS, COHERENCE, Verdict
from tokcompile.rope.ropetable import TableCheck, check_tables
from tokcompile.sites import find_sites
from tokcompile.sites.frequencies import Curve, Section, Unknown, find_curves
from tokcompile.wasted import COUNTED, Balance, balance

MOST_POSITIONS = 1 << 20
"""Tables are built for no more positions than these."""


@dataclass(frozen=True)
class Lengths:
    """Largest positions, as the user gives them.

    Attributes:
        text: of decoders and encoders; None for what the model's configuration says.
        by_place: by stack (`vision`), or stack and coordinate (`decoder.0`).
    """

    text: float | None = None
    by_place: Mapping[str, float] = field(default_factory=dict)

    @staticmethod
    def parse(words: Sequence[str]) -> Lengths:
        """Read words such as `32768`, `vision=64` and `decoder.0=4096`.

        Raises:
            TokredError: a word is none of these, or comes twice.
        """
        text, places = None, {}
        for word in words:
            place, equals, number = word.rpartition("=")
            value = int(number) if number.isdecimal() else 0
            if value < 1 or bool(equals) != bool(place) or place in places or (not place and text is not None):
                raise TokredError(
                    f"'{word}' is no context, or one too many",
                    remedy="--context 32768, or --context vision=64 beside it",
                )
            if place:
                places[place] = float(value)
            else:
                text = float(value)
        return Lengths(text, places)

    def of(self, stack: str, coordinate: int | None = None) -> float | None:
        """The length of a stack, or of one coordinate in it; None where the user says nothing of it."""
        own = self.by_place.get(stack if coordinate is None else f"{stack}.{coordinate}")
        if own is None and coordinate is not None:
            own = self.by_place.get(stack)
        return self.text if own is None and not stack.startswith("vision") else own


@dataclass(frozen=True)
class SectionReport:
    """The bounds for the frequencies of one coordinate; `verdict` is None where they do not say a base.

    Attributes:
        similarity: where it was asked for: up to which position these frequencies favour tokens that are alike, and
            the least base by which they would up to `length`.
    """

    section: Section
    length: float
    verdict: Verdict | None
    base: float | None
    similarity: tuple[int, float] | None = None


@dataclass(frozen=True)
class CurveReport:
    """One curve: its sections against the bounds, and its tables; `note` says what could not be found out."""

    curve: Curve
    sections: tuple[SectionReport, ...] = ()
    table: TableCheck | None = None
    note: str = ""


@dataclass(frozen=True)
class Lint:
    """All that was found in a model.

    Attributes:
        graphs: how many the model came in.
        balances: of the rules, one for each graph; nothing without rules.
    """

    model: str
    graphs: int
    eps: float
    exact_d: bool
    curves: tuple[CurveReport, ...]
    rules: tuple[RuleInstance, ...] = ()
    balances: tuple[Balance, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "model": self.model,
            "graphs": self.graphs,
            "eps": self.eps,
            "exact_d": self.exact_d,
            "rotary": [_curve_data(report) for report in self.curves],
            "rules": [rule.name for rule in self.rules],
            "wasted": [asdict(each) for each in self.balances],
            "flops_are": COUNTED if self.rules else "",
        }


def lint(
    source: Source,
    lengths: Lengths | None = None,
    *,
    rules: Sequence[RuleInstance] = (),
    eps: float = COHERENCE,
    exact_d: bool = False,
    tables: bool = True,
    similarity: bool = False,
) -> Lint:
    """Look at the rotary tables of a model, and at what rules cost in it.

    Args:
        source: the model and example inputs of it.
        lengths: largest positions; without any, what the model's configuration says.
        eps: coherence of the slowest frequency, between 0 and 1.
        exact_d: bounds with the rotary dimension, rather than the paper's theta_min ~ 1 / base.
        tables: build the tables of all positions, and count rows that are alike.
        similarity: hold the frequencies against the second opinion of `ropesimilarity`, too.

    Raises:
        TokredError: the model cannot be captured, or eps is out of range.
    """
    ropebounds.coherent_angle(eps)
    lengths = lengths or Lengths()
    longest = lengths.text or _configured(source) or 1.0
    source, programs, fixed = capture_at(source, int(max([longest, *lengths.by_place.values()])))
    with packed(source.model):
        values = Values(source.model, precompute(source.model, source.inputs), fixed)
    curves = []
    for program in programs:
        curves += _curves(program, values, lengths, _configured(source), eps, exact_d, tables)
    if similarity:
        curves = [
            replace(each, sections=tuple(map(partial(_second_opinion, each.curve), each.sections))) for each in curves
        ]
    balances = [balance(program, rules) for program in programs] if rules else []
    return Lint(source.name, len(programs), eps, exact_d, tuple(curves), tuple(rules), tuple(balances))


def _configured(source: Source) -> float | None:
    config = getattr(source.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    return float(found) if isinstance(found, int) and found > 0 else None


def _curves(
    program: Program,
    values: Values,
    lengths: Lengths,
    configured: float | None,
    eps: float,
    exact_d: bool,
    tables: bool,
) -> list[CurveReport]:
    sites = find_sites(program)
    known = {name: lengths.of(name) or (None if name.startswith("vision") else configured) for name in sites.stacks}
    found = find_curves(program, sites, values, {name: length or 1.0 for name, length in known.items()})
    return [_report(curve, known[curve.stack], lengths, eps, exact_d, tables) for curve in found]


def _report(
    curve: Curve, length: float | None, lengths: Lengths, eps: float, exact_d: bool, tables: bool
) -> CurveReport:
    if curve.why:
        return CurveReport(curve, note=curve.why)
    try:
        length = length or float(max(curve.runner.largest(), 1))
    except Unknown as error:
        return CurveReport(curve, note=f"no largest position is known ({error}): give --context {curve.stack}=N")
    sections = tuple(_section(curve, each, length, lengths, eps, exact_d) for each in curve.sections)
    if not tables:
        return CurveReport(curve, sections)
    try:
        table = check_tables(curve, int(min(max(each.length for each in sections), MOST_POSITIONS)))
    except RuntimeError as error:
        return CurveReport(curve, sections, note=f"the tables cannot be built here: {str(error).splitlines()[0]}")
    return CurveReport(curve, sections, table)


def _section(
    curve: Curve, section: Section, length: float, lengths: Lengths, eps: float, exact_d: bool
) -> SectionReport:
    length = (lengths.of(curve.stack, section.coordinate) if section.coordinate is not None else None) or length
    if curve.width < 4:  # a lone frequency is 1 whatever the base
        return SectionReport(section, length, None, None)
    base = ropebounds.base_of(section.slowest, curve.width)
    d = curve.width if exact_d else None
    return SectionReport(
        section, length, ropebounds.judge(base, length, len(curve.blocks), curve.dtype, eps=eps, d=d), base
    )


def _second_opinion(curve: Curve, report: SectionReport) -> SectionReport:
    """With its similarity, where one coordinate has all frequencies: B(m) is a sum over a whole head."""
    length = int(min(report.length, MOST_POSITIONS))
    if report.section.coordinate is not None or report.verdict is None:
        return report
    found = ropesimilarity.reach(report.section.frequencies, length), ropesimilarity.least_base(length, curve.width)
    return replace(report, similarity=found)


def _curve_data(report: CurveReport) -> dict[str, Any]:
    curve = report.curve
    return {
        "stack": curve.stack,
        "blocks": list(curve.blocks),
        "layers": len(curve.blocks),
        "dtype": curve.dtype,
        "rotary_dim": curve.width,
        "note": report.note,
        "sections": [_section_data(each) for each in report.sections],
        "table": asdict(report.table) if report.table is not None else None,
    }


def _section_data(report: SectionReport) -> dict[str, Any]:
    data: dict[str, Any] = {
        "coordinate": report.section.coordinate,
        "frequencies": len(report.section.frequencies),
        "slowest": report.section.slowest,
        "length": report.length,
        "base_eff": report.base,
    }
    if report.similarity is not None:
        held, least = report.similarity
        data["similarity"] = {"source": ropesimilarity.PAPER, "holds_up_to": held, "least_base": least}
    if report.verdict is None:
        return {**data, "verdict": None}
    found = report.verdict
    bounds = [
        {
            **asdict(bound),
            "base": found.bounds[bound.name],
            "margin_log10": found.margins[bound.name],
            "max_length": found.longest[bound.name],
        }
        for bound in BOUNDS
    ]
    return {**data, "verdict": found.word, "interval": list(found.interval), "bounds": bounds}
