"""What `tokred retrieval` shows: a table, a page of markdown for the docs, and two plots."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from tokcompile.pages import plots
from tokcompile.pages.rulepages import table
from tokcompile.retrieval import BANDS, LAST, MODEL, STEP, Cell, Found

REFUSED = "–"
PAGE, CELLS, PLOT, DEPTHS = "retrieval.md", "retrieval.json", "retrieval.svg", "retrieval_depth.svg"
ASKED = {"after": "Asked after the compression", "before": "Asked before the compression"}


def by_rule(found: Found) -> dict[str, list[Cell]]:
    """Cells of each rule, in the order of budgets."""
    rules: dict[str, list[Cell]] = {}
    for cell in found.cells:
        rules.setdefault(cell.rule, []).append(cell)
    return rules


def render(found: Found, plain: bool) -> RenderableType:
    """The table of `tokred retrieval`: a line for each cell."""
    result = table("rule", "budget", "keys", "asked before, %", "asked after, %", "perplexity", "options", plain=plain)
    for cell in (found.unevicted, *found.cells):
        if cell.refused:
            result.add_row(cell.rule, cell.budget, "", Text(f"refused: {_first_line(cell.refused)}"), "", "", "")
            continue
        figures = (_keys(cell), _share(cell, "before"), _share(cell, "after"), _perplexity(cell))
        result.add_row(cell.rule, cell.budget, *figures, cell.options)
    count = f"{len(found.cells)} cells, {found.computed} cells computed now; "
    return Group(result, Text(count + f"{found.settings.texts} texts, figures with their standard errors"))


def write(found: Found, out: Path) -> list[Path]:
    """Write the page and the plots beside the file of cells, and return what was written."""
    out.mkdir(parents=True, exist_ok=True)
    made = {PAGE: to_markdown, PLOT: to_svg, DEPTHS: to_depth_svg}
    for name, make in made.items():
        (out / name).write_text(make(found), encoding="utf-8")
    return [out / name for name in made]


def to_markdown(found: Found) -> str:
    """The page: accuracy and perplexity by rule and budget, accuracy by depth, and what was refused."""
    plain = found.unevicted
    lines = [
        *_introduction(found),
        "",
        f"![Accuracy and perplexity against the budget, a line for each rule]({PLOT})",
        "",
    ]
    for when, title in ASKED.items():
        lines += [f"## {title}", "", f"Right answers in %, ± standard error; without a rule {_share(plain, when)}.", ""]
        lines += [*_matrix(found, lambda cell, when=when: _share(cell, when)), ""]
    lines += ["## Perplexity", "", f"± standard error; without a rule {_perplexity(plain)}.", ""]
    lines += [*_matrix(found, _perplexity), "", *_depths(found), "", "## Options", ""]
    lines += [
        f"`window` and `recent`, the last tokens that stay, are a rule's defaults (`recent` at least {LAST['recent']}: "
        "a rule that keeps fewer may evict the question itself), or half of the budget where that is less. "
        "Not a default:",
        "",
    ]
    lines += [*_options(found), "", "Keys in a cached head after the prompt, by block where blocks differ:", ""]
    lines += [*_matrix(found, _keys), *_refusals(found)]
    return "\n".join(lines) + "\n"


def _introduction(found: Found) -> list[str]:
    """How the figures were made, and what they mean."""
    s, plain = found.settings, found.unevicted
    made = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    of = f" (SHA-256 of its weights {found.checkpoint[:16]}…)" if found.checkpoint else ""
    return [
        "# What an evicted cache still knows",
        "",
        f"`{MODEL}`{of} on {s.texts} texts (seed {s.seed}), target `{s.target}` ({made}). This page and its plots are "
        "made by `make retrieval`.",
        "",
        f"Each prompt is {s.length} tokens of a made-up language in which {s.needles} needles are hidden, "
        f"`<key> K V V`. A rule evicts keys after the prompt; a budget is how many of its {s.length} keys each cached "
        "head keeps. Then a second call reads the cache: a question, `<ask> K`, whose answer is right when both words "
        "V are, or the next words of the text. Later steps, in which some rules evict again, are not measured.",
        "",
        f"- *Asked after*: the prompt has no question in it. Each text is asked about each of its needles "
        f"({sum(plain.after_asked)} questions).",
        f"- *Asked before*: the question is the end of the prompt, so that the last queries ask for what is to be kept "
        f"({sum(plain.before_asked)} questions). As in any generation the first word of the answer comes from the "
        "prompt itself, which sees all keys; the second is read from what is left.",
        f"- *Perplexity*: of {STEP - 1} words that go on after the compression. A word has one successor that is the "
        "text's own half of the time, so a model that remembers nothing of the text does worse.",
        "",
        "The model has few blocks, whose heads have clear tasks, and `<key>` stands out among its words: figures "
        "compare rules with each other; a large model loses other amounts.",
    ]


def _depths(found: Found) -> list[str]:
    """Accuracy by depth of the rule that answers most: a table; of all rules: a plot."""
    shown = {rule: cells for rule, cells in by_rule(found).items() if not all(cell.refused for cell in cells)}
    if not shown:
        return []
    best = max(shown, key=lambda rule: sum(c.accuracy(when)[0] for c in shown[rule] if not c.refused for when in ASKED))
    lines = [
        "## By depth",
        "",
        "Right answers by where in the text the needle stands, from its first fifth to its last.",
        "",
        f"![Accuracy by depth and budget, a panel for each rule]({DEPTHS})",
        "",
        f"The same in figures for `{best}`, which answers most questions; in %, asked after / asked before:",
        "",
    ]
    rows = [["depth", *found.settings.budgets], ["---"] * (1 + len(found.settings.budgets))]
    for band in range(BANDS):
        rows.append([_band(band), *(_at_depth(cell, band) for cell in shown[best])])
    return [*lines, *_rows(rows)]


def _band(band: int) -> str:
    return f"{100 * band // BANDS}–{100 * (band + 1) // BANDS} %"


def _at_depth(cell: Cell, band: int) -> str:
    if cell.refused:
        return REFUSED
    return " / ".join(f"{100 * cell.accuracy(when, band)[0]:.0f}" if _asked(cell, when)[band] else "" for when in ASKED)


def _asked(cell: Cell, when: str) -> tuple[int, ...]:
    return getattr(cell, f"{when}_asked")


def _options(found: Found) -> list[str]:
    lines = []
    for rule, cells in by_rule(found).items():
        given = [f"{cell.options} at {cell.budget}" for cell in cells if cell.options]
        lines += [f"- {rule}: {'; '.join(given)}"] if given else []
    return lines or ["- none"]


def _refusals(found: Found) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in found.cells:
        if cell.refused:
            reasons.setdefault((cell.rule, _first_line(cell.refused)), []).append(cell.budget)
    lines = [f"- {rule} at {', '.join(budgets)}: {_escaped(why)}" for (rule, why), budgets in reasons.items()]
    return ["", "Refused:", "", *lines] if lines else []


def _matrix(found: Found, show: Callable[[Cell], str]) -> list[str]:
    rows = [["rule", *found.settings.budgets], ["---"] * (1 + len(found.settings.budgets))]
    for rule, cells in by_rule(found).items():
        rows.append([rule, *(REFUSED if cell.refused else show(cell) for cell in cells)])
    return _rows(rows)


def _rows(rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in rows]


def _share(cell: Cell, when: str) -> str:
    share, error = cell.accuracy(when)
    return f"{100 * share:.1f} ± {100 * error:.1f}"


def _perplexity(cell: Cell) -> str:
    return f"{cell.perplexity:.2f} ± {cell.perplexity * cell.loss_error:.2f}"


def _keys(cell: Cell) -> str:
    return " ".join(map(str, cell.kept[:1] if len(set(cell.kept)) == 1 else cell.kept))


def _first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def to_svg(found: Found) -> str:
    """The plot of accuracy and perplexity, the same bytes for the same figures."""
    title = _title("Needles found and perplexity by budget", found)
    label = f"{title}; a line for each of {len(by_rule(found))} rules"
    return plots.svg(lambda figure: _draw(figure, found), (12, 4.5), title, label)


def to_depth_svg(found: Found) -> str:
    """The plot of accuracy by depth, the same bytes for the same figures."""
    title, rules = _title("Needles found by depth and budget", found), by_rule(found)
    size = (1.2 + 1.9 * max(len(rules), 1), 4.6)
    return plots.svg(lambda figure: _draw_depths(figure, found), size, title, f"{title}; {len(rules)} rules")


def _title(what: str, found: Found) -> str:
    return f"{what}, {MODEL}, {found.settings.texts} texts of {found.settings.length} tokens"


def _draw(figure: Any, found: Found) -> None:
    plain, budgets = found.unevicted, found.settings.budgets
    panels: list[tuple[str, Callable[[Cell], tuple[float, float]]]] = [
        (title, lambda cell, when=when: tuple(100 * value for value in cell.accuracy(when)))
        for when, title in ASKED.items()
    ]
    panels.append(("Going on", lambda cell: (cell.perplexity, cell.perplexity * cell.loss_error)))
    axes = figure.subplots(1, len(panels))
    for ax, (title, value) in zip(axes, panels, strict=True):
        ax.axhline(value(plain)[0], color="0.5", linewidth=1, label="no rule")
        for (rule, cells), look in zip(by_rule(found).items(), plots.looks(), strict=False):
            shown = [(x, *value(cell)) for x, cell in enumerate(cells) if not cell.refused]
            if shown:
                places, values, errors = zip(*shown, strict=True)
                ax.errorbar(places, values, yerr=errors, label=rule, **look)
        ax.set(title=title, xlabel="keys kept", ylabel="right answers, %", xticks=range(len(budgets)))
        ax.set_xticklabels(budgets)
        ax.grid(alpha=0.3)
    axes[-1].set(ylabel="perplexity")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9)
    figure.suptitle(_title("Needles found and perplexity by budget", found), fontsize=11)


def _draw_depths(figure: Any, found: Found) -> None:
    rules, budgets = by_rule(found), found.settings.budgets
    axes = figure.subplots(len(ASKED), max(len(rules), 1), squeeze=False, sharex=True, sharey=True)
    drawn = None
    for row, when in zip(axes, ASKED, strict=True):
        for ax, (rule, cells) in zip(row, rules.items(), strict=False):
            drawn = ax.pcolormesh(_grid(cells, when), vmin=0, vmax=100, cmap="viridis")
            ax.set(xticks=[x + 0.5 for x in range(len(budgets))], yticks=[y + 0.5 for y in range(BANDS)])
            ax.set_xticklabels(budgets, rotation=90, fontsize=8)
            ax.set_yticklabels([_band(band) for band in range(BANDS)], fontsize=8)
            ax.set_title(f"{rule}\nasked {when}", fontsize=9)
    axes[0][0].invert_yaxis()
    if drawn is not None:
        figure.colorbar(drawn, ax=axes, label="right answers, %")
    figure.suptitle(_title("Needles found by depth and budget", found), fontsize=11)


def _grid(cells: list[Cell], when: str) -> list[list[float]]:
    """Accuracy in %, by depth and budget; nothing is drawn where nothing is known."""
    nothing = float("nan")
    return [
        [
            100 * cell.accuracy(when, band)[0] if not cell.refused and _asked(cell, when)[band] else nothing
            for cell in cells
        ]
        for band in range(BANDS)
    ]
