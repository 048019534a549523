"""What a terminal shows of a lint: each bound in a line, with its formula, its source and what it does not say."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from tokcompile.lint import CurveReport, Lint, SectionReport
from tokcompile.pages.rulepages import table
from tokcompile.pages.sitepages import spans
from tokcompile.pages.units import amount
from tokcompile.rope import ropesimilarity
from tokcompile.rope.ropebounds import BOUNDS, PRECISION
from tokcompile.rope.ropetable import TableCheck
from tokcompile.wasted import COUNTED, Balance

_MEANING = {
    "ok": "within all four bounds",
    "below_depth": "too small for so many layers",
    "below_dc": "too small: the slowest frequency loses its coherence within the context",
    "aliased": "too small: the slowest frequency comes round within the context",
    "above_precision": "too large for the format that angles are computed in",
    "wall": "no base at all satisfies the four bounds",
}


def render(found: Lint, plain: bool) -> RenderableType:
    """The page of `tokred lint`; nothing but a line for a model without rotary tables."""
    graphs = "" if found.graphs == 1 else f", in {found.graphs} graphs"
    parts: list[RenderableType] = [Text(f"{found.model}{graphs}: advice, of which nothing is an error", style="bold")]
    if not found.curves:
        parts.append(Text("no rotary tables are computed in its graph: nothing to report"))
    for report in found.curves:
        parts += [Text(), *_curve(report, found, plain)]
    for number, each in enumerate(found.balances):
        parts += [Text(), *_balance(number, each, found, plain)]
    return Group(*parts)


def _curve(report: CurveReport, found: Lint, plain: bool) -> list[RenderableType]:
    curve = report.curve
    title = (
        f"{curve.stack}, blocks {spans(curve.blocks)}: N = {len(curve.blocks)} layers, rotary dimension "
        f"d = {curve.width or '?'}, angles in {curve.dtype}"
    )
    parts: list[RenderableType] = [Text(title, style="bold")]
    if report.note:
        parts.append(Text(report.note, style="yellow"))
    for section in report.sections:
        parts += _section(section, curve.width if found.exact_d else None, found.eps, plain)
    if report.table is not None:
        parts.append(Text(_table_line(report.table)))
    return parts


def _section(report: SectionReport, exact: int | None, eps: float, plain: bool) -> list[RenderableType]:
    where = "" if report.section.coordinate is None else f"coordinate {report.section.coordinate}: "
    facts = f"{where}L = {report.length:.0f}, theta_min = {report.section.slowest:.4g}"
    if report.verdict is None:
        return [Text(f"{facts}: one frequency alone says no base")]
    verdict = report.verdict
    low, high = verdict.interval
    words = (
        f"{facts}, base_eff = theta_min^(-d / (d - 2)) = {report.base:.5g}: {verdict.word} ({_MEANING[verdict.word]}); "
        f"feasible: {low:.4g} <= base < {high:.4g}{', which is empty' if low >= high else ''}"
    )
    style = "green" if verdict.word == "ok" else "yellow"
    power = f", right side ^({exact}/{exact - 2})" if exact else ""
    result = table("bound", "formula", "base", "margin log10", "max L", "source", "caveat", plain=plain)
    for bound in BOUNDS:
        sign = bound.formula.split()[1]
        limit = f"{verdict.longest[bound.name]:.4g}" + (" (wall)" if bound is PRECISION else "")
        formula = f"{bound.formula}{power}"
        result.add_row(
            bound.name,
            Text(formula.replace("eps^", f"{eps:g}^").replace("(eps)", f"({eps:g})")),
            f"{sign} {verdict.bounds[bound.name]:.4g}",
            f"{verdict.margins[bound.name]:+.2f}",
            limit,
            Text(bound.source),
            Text(bound.caveat),
        )
    return [Text(words, style=style), result, *_similarity(report)]


def _similarity(report: SectionReport) -> list[RenderableType]:
    if report.similarity is None:
        return []
    held, least = report.similarity
    words = (
        f"second opinion, sum of cos(m theta_i) >= 0 for m up to L ({ropesimilarity.PAPER}): holds up to m = {held}; "
        f"least base of a scan {least:.3g}, within a factor of 2: what fits is no interval"
    )
    return [Text(words, style="green" if held >= report.length else "yellow")]


def _table_line(check: TableCheck) -> str:
    pair = "none" if check.first_pair is None else f"positions {check.first_pair} and {check.first_pair + 1}"
    return (
        f"tables of {check.positions} positions, built as the model builds them: {check.duplicates} rows stand twice, "
        f"first alike neighbours: {pair}; {check.same_angle} neighbours share the fastest angle; largest error of an "
        f"angle to float64: {check.worst:.2g}"
    )


def _balance(number: int, each: Balance, found: Lint, plain: bool) -> list[RenderableType]:
    graph = "" if found.graphs == 1 else f" in graph {number}"
    names = ", ".join(rule.name for rule in found.rules)
    refused = any(waste.kind == "refused" for waste in each.findings)
    figures = "" if refused else f" costs {amount(each.cost, 'FLOP')} and saves {amount(each.saved, 'FLOP')}"
    parts: list[RenderableType] = [Text(f"rule {names}{graph}{figures} ({COUNTED})", style="bold")]
    if not each.findings:
        return [*parts, Text("no wasted work", style="green")]
    result = table("finding", "formula", "source", "what", plain=plain)
    for waste in each.findings:
        result.add_row(waste.kind, waste.formula, waste.source, Text(waste.text))
    return [*parts, result]
