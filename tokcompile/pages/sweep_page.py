"""What a sweep shows: a table, a page of markdown for the docs, and a plot of accuracy against image tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tokcompile.pages import plots
from tokcompile.pages.rulepages import table
from tokcompile.pages.units import amount
from tokcompile.sweep import Cell, Sweep

REFUSED = "–"
PLOT, PAGE, CELLS = "sweep.svg", "sweep.md", "sweep.json"


def by_rule(found: Sweep) -> dict[str, list[Cell]]:
    """Cells of each rule, in the order of budgets."""
    rules: dict[str, list[Cell]] = {}
    for cell in found.cells:
        rules.setdefault(cell.rule, []).append(cell)
    return rules


def render(found: Sweep, plain: bool) -> RenderableType:
    """The table of `tokred sweep`: a line for each cell."""
    result = table("rule", "keep", "accuracy %", "image tokens", "in the decoder", "decoder FLOPs", plain=plain)
    for cell in (found.unpruned, *found.cells):
        if cell.refused:
            result.add_row(cell.rule, cell.keep, Text(f"refused: {_first_line(cell.refused)}"), "", "", "")
            continue
        words = (_accuracy(cell), _tokens(cell), _mean(cell), amount(cell.flops))
        result.add_row(cell.rule, cell.keep, *words)
    count = f"{len(found.cells)} cells, {found.computed} of them computed now; "
    return Group(result, Text(count + f"{found.settings.images} images, accuracy with its standard error"))


def write(found: Sweep, out: Path) -> list[Path]:
    """Write the page and the plot beside the file of cells, and return what was written."""
    out.mkdir(parents=True, exist_ok=True)
    page, plot = out / PAGE, out / PLOT
    page.write_text(to_markdown(found), encoding="utf-8")
    plot.write_text(to_svg(found), encoding="utf-8")
    return [page, plot]


def to_markdown(found: Sweep) -> str:
    """The page: accuracy by rule and budget, what was left of the image, and what was refused."""
    settings, plain = found.settings, found.unpruned
    made = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    rules = by_rule(found)
    lines = [
        "# Accuracy by rule and budget",
        "",
        f"`zoo:llava-digits` on {settings.images} test images, target `{settings.target}` ({made}). This page and its "
        "plot are made by `make sweep`.",
        "",
        f"![Accuracy against image tokens, a line for each rule]({PLOT})",
        "",
        f"Accuracy in %, ± its standard error (binomial); without a rule {_accuracy(plain)}.",
        "",
        *_matrix(found, rules, _accuracy),
        "",
        f"Image tokens kept of {plain.fed}. `+ n` are further tokens that the rule gives to the decoder, such as "
        "markers. In brackets: tokens of the whole prompt in a block of the decoder, the mean of its "
        f"{len(plain.tokens)} blocks ({_mean(plain)} without a rule).",
        "",
        *_matrix(found, rules, lambda cell: f"{_tokens(cell)} ({_mean(cell)})"),
    ]
    refused = [cell for cell in found.cells if cell.refused]
    if refused:
        reasons: dict[tuple[str, str], list[str]] = {}
        for cell in refused:
            reasons.setdefault((cell.rule, _first_line(cell.refused)), []).append(cell.keep)
        lines += ["", "Refused:", ""]
        lines += [f"- {rule} at {', '.join(keeps)}: {_escaped(why)}" for (rule, why), keeps in reasons.items()]
    return "\n".join(lines) + "\n"


def _matrix(found: Sweep, rules: dict[str, list[Cell]], show: Callable[[Cell], str]) -> list[str]:
    rows = [["rule", *found.settings.keeps], ["---"] * (1 + len(found.settings.keeps))]
    for rule, cells in rules.items():
        rows.append([rule, *(REFUSED if cell.refused else show(cell) for cell in cells)])
    return ["| " + " | ".join(row) + " |" for row in rows]


def _accuracy(cell: Cell) -> str:
    return f"{100 * cell.accuracy:.1f} ± {100 * cell.error:.1f}"


def _tokens(cell: Cell) -> str:
    more = cell.fed - cell.image_tokens
    return f"{cell.image_tokens}" + (f" {'+' if more > 0 else '-'} {abs(more)}" if more else "")


def _mean(cell: Cell) -> str:
    return f"{sum(cell.tokens) / len(cell.tokens):.0f}"


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def to_svg(found: Sweep) -> str:
    """The plot, the same bytes for the same sweep."""
    title = _title(found)
    label = f"{title}; a line for each of {len(by_rule(found))} rules"
    return plots.svg(lambda figure: _draw(figure.subplots(), found), (9, 5.5), title, label)


def _title(found: Sweep) -> str:
    return f"Accuracy against image tokens, zoo:llava-digits, {found.settings.images} images"


def _draw(axes: Any, found: Sweep) -> None:
    plain = found.unpruned
    axes.axhline(100 * plain.accuracy, color="0.5", linewidth=1, label=f"no rule, {plain.fed} tokens")
    for (rule, cells), look in zip(by_rule(found).items(), plots.looks(), strict=False):
        shown = sorted((c for c in cells if not c.refused), key=lambda cell: cell.fed)
        if not shown:
            continue
        axes.errorbar(
            [cell.fed for cell in shown],
            [100 * cell.accuracy for cell in shown],
            yerr=[100 * cell.error for cell in shown],
            label=rule,
            **look,
        )
    axes.set(xlabel="image tokens in the last block of the decoder", ylabel="accuracy, %, ± standard error")
    axes.set_title(_title(found), fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, ncols=1 + len(by_rule(found)) // 18)
