"""`make coverage`: run the tests of the families, and write what they found to docs/models.md; fail on a lost cell."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import unloaded

from tokcompile.models.catalogue import families

ROOT = Path(__file__).parent.parent
PAGE, RECORD = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
TESTS = {
    "test_stacks_are_complete": "sites",
    "test_keeping_everything_keeps_every_bit": "keep all",
    "test_a_drop_equals_the_run_by_hand_or_is_refused": "drop",
    "test_an_exported_program_keeps_its_bits_and_drops_or_is_refused": "export",
}

HOW = ("drop", "export")


class Results:
    """Collects one outcome a test: `exact`, `refused: why`, `skipped` or `failed`."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test of a family, by the names in its id."""
        found = re.search(r"::(\w+)\[([\w]+)(?:-(\w+))?\]$", report.nodeid)
        if found is None or found[1] not in TESTS or (report.when != "call" and report.outcome == "passed"):
            return
        family, stack = found[2], found[3]
        column = TESTS[found[1]] if stack is None else f"{TESTS[found[1]]}, {stack}"
        self.cells.setdefault(family, {})[column] = _outcome(report, family, stack)


def _outcome(report: pytest.TestReport, family: str, stack: str | None) -> str:
    from core.test_families import REFUSED

    if report.outcome != "passed":
        return report.outcome
    if stack is not None and (family, stack) in REFUSED:
        return f"refused: {REFUSED[family, stack]}"
    return "exact"


def page(cells: dict[str, dict[str, str]], versions: str) -> str:
    """The coverage table as Markdown."""
    from core.test_families import EXPORT_DIFFERS, SPLIT

    columns = ["sites", "keep all", *(f"{how}, {s}" for s in ("decoder", "encoder", "vision") for how in HOW)]
    lines = [
        "# Models",
        "",
        f"What `make coverage` found ({versions}), for small models with random weights, two padded rows:",
        "",
        "- *sites*: as many blocks and attentions as the configuration has layers;",
        "- *keep all*: a rule that keeps every token leaves every bit of the output as it is;",
        "- *drop*: random tokens dropped before the second block of a stack; *exact* is a difference of 0 to the same",
        "  model run by hand on the tokens that stay, under `torch.compile`; *refused* is an error that says why;",
        "- *export*: the same of the program of `tokcompile.export`, and that keeping every token keeps its bits.",
        "",
        "| family | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for family in cells:
        lines.append(f"| {family} | " + " | ".join(cells[family].get(c, "") for c in columns) + " |")
    lines += [
        "",
        f"In pieces under `torch.compile` (the text alone is rewritten): {', '.join(SPLIT)}. Not to the last bit what",
        f"eager says when exported, with or without a rule: {', '.join(EXPORT_DIFFERS)}. Families of timm are tried",
        "where it is installed: `make coverage EXTRAS=demo,dev,timm`.",
    ]
    return "\n".join(lines) + "\n"


def complete(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """What was found now; a family that needs a module which is missing here keeps what was found elsewhere."""
    needs = {name: family.needs for name, family in families().items()}
    return {name: before.get(name, row) if unloaded.missing(needs.get(name, "")) else row for name, row in now.items()}


def lost(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """Cells that were exact and are not."""
    return [
        f"{family}: {column} was exact, is {now.get(family, {}).get(column, 'gone')}"
        for family, row in before.items()
        for column, value in row.items()
        if value == "exact" and now.get(family, {}).get(column) != "exact"
    ]


def main() -> int:
    """Run, write, compare."""
    sys.path.insert(0, str(ROOT / "tests"))
    results = Results()
    pytest.main(["-q", "-m", "slow or not slow", str(ROOT / "tests" / "core" / "test_families.py")], plugins=[results])
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    cells = complete(before, results.cells)
    gone = lost(before, cells)
    for line in gone:
        print(line)
    if not gone and cells:
        RECORD.write_text(json.dumps(cells, indent=1) + "\n")
        PAGE.write_text(page(cells, _versions()))
    return 1 if gone or not cells else 0


def _versions() -> str:
    modules = [m for m in ("torch", "transformers", "timm") if not unloaded.missing(m)]
    return ", ".join(f"{m} {import_module(m).__version__}" for m in modules)


if __name__ == "__main__":
    sys.exit(main())
