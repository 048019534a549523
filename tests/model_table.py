"""`make coverage`: run the tests of the families, and write what they found to docs/models.md; fail on a lost cell."""

from __future__ import annotations

import json
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import unloaded

ROOT = Path(__file__).parent.parent
PAGE, RECORD = ROOT / "docs" / "models.md", ROOT / "docs" / "models.json"
TESTS = {
    "test_stacks_are_complete": "sites",
    "test_keeping_everything_keeps_every_bit": "keep all",
    "test_a_drop_equals_the_run_by_hand_or_is_refused": "drop",
    "test_dropping_features_is_dropping_their_tokens": "drop, features",
    "test_dropping_features_of_an_exported_program": "export, features",
    "test_an_exported_program_keeps_its_bits_and_drops_or_is_refused": "export",
    "test_a_drop_from_other_inputs_equals_the_run_by_hand_or_is_refused": "",
    "test_generate_after_a_drop_equals_a_run_by_hand": "generate",
    "test_a_rule_equals_the_run_by_hand_or_is_refused": "rule",
    "test_keeping_everything_under_a_rule_keeps_every_bit": "rule keeps all",
    "test_an_exported_program_under_a_rule_equals_the_run_by_hand_or_is_refused": "rule exported",
    "test_generate_under_a_rule_equals_a_run_by_hand": "rule generates",
    "test_caches_hold_the_keys_of_the_naive_form_or_the_rule_is_refused": "evict",
    "test_generate_equals_a_run_that_hides_what_was_evicted": "evict generates",
    "test_steps_attend_to_the_keys_of_the_naive_form_or_the_rule_is_refused": "route",
}
"""What a test says, by its name; the second part of its id, a stack, rule or kind of inputs, follows after a comma."""
FILES = (
    "test_families.py",
    "test_family_inputs.py",
    "test_family_generate.py",
    "test_family_rules.py",
    "test_family_evict.py",
    "test_family_routes.py",
)
HELD = ("exact", "equal")
HOW = ("drop", "export")


class Results:
    """Collects one outcome a test: `exact`, `refused: why`, `skipped` or `failed`."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a test of a family, by the names in its id."""
        found = re.search(r"::(\w+)\[([\w]+)(?:-([\w ]+))?\]$", report.nodeid)
        if found is None or found[1] not in TESTS or (report.when != "call" and report.outcome == "passed"):
            return
        family, part = found[2], found[3]
        column = ", ".join(filter(None, (TESTS[found[1]], part)))
        self.cells.setdefault(family, {})[column] = _outcome(report, family, part)


def _outcome(report: pytest.TestReport, family: str, part: str | None) -> str:
    """What a test of a family and one of its stacks, or a rule, found."""
    from core import (
        test_families,
        test_family_evict,
        test_family_generate,
        test_family_inputs,
        test_family_routes,
        test_family_rules,
    )

    if report.outcome != "passed":
        return report.outcome
    if "test_family_generate" in report.nodeid:
        return _said("equal", test_family_generate.NOT_GENERATED.get(family))
    if "hides_what_was_evicted" in report.nodeid:
        return _said("equal", test_family_evict.ENDED.get((family, part or "")))
    if "test_caches_hold" in report.nodeid:
        return _said("exact", test_family_evict.REFUSED.get((family, part or "")))
    if "test_steps_attend" in report.nodeid:
        return _said("equal", test_family_routes.NOT_ROUTED.get((family, part or "")))
    if "test_generate_under" in report.nodeid:
        return "equal"
    why = (test_families.REFUSED | test_family_inputs.REFUSED | test_family_rules.REFUSED).get((family, part or ""))
    return _said("exact", why)


def _said(held: str, why: str | None) -> str:
    """A cell, given the pattern of the error that a test expects."""
    return held if why is None else f"refused: {why}".replace("\\", "")


def page(cells: dict[str, dict[str, str]], versions: str) -> str:
    """The coverage table as Markdown."""
    from core.test_families import EXPORT_DIFFERS
    from core.test_family_inputs import KINDS

    columns = ["sites", "keep all", *(f"{how}, {s}" for s in ("decoder", "encoder", "vision") for how in HOW)]
    columns += ["drop, features", "export, features", *KINDS, "generate"]
    lines = [
        "# Models",
        "",
        f"What `make coverage` found ({versions}), for small models with random weights, two padded rows:",
        "",
        "- *sites*: as many blocks and attentions as the configuration has layers;",
        "- *keep all*: a rule that keeps every token leaves every bit of the output as it is;",
        "- *drop*: random tokens dropped before the second block of a stack; *exact* is a difference of 0 to the same",
        "  model run by hand on the tokens that stay, under `torch.compile`; *refused* is an error that says why;",
        "- *export*: the same of the program of `tokcompile.export`, and that keeping every token keeps its bits;",
        "- *drop, features*, *export, features*: random features of images dropped before they are put among the",
        "  text, or, where the text attends to them, before it does;",
        "- *two images*, *text*, *video*: *keep all* and *drop* of a decoder whose text has two images or a video in",
        "  each row, or neither;",
        "- *generate*: four tokens from a prompt so pruned; *equal* is within 1e-4 of runs by hand that have no cache.",
        "",
        "| family | " + " | ".join(columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for family in cells:
        lines.append(f"| {family} | " + " | ".join(cells[family].get(c, "") for c in columns) + " |")
    lines += [
        "",
        "In towers of vision-language models the text follows what is dropped; patches of one feature go together.",
        f"Not to the last bit what eager says when exported, with or without a rule: {', '.join(EXPORT_DIFFERS)};",
        "gemma3's tower is exact within 2e-5, as patches are averaged across memory whose steps are shorter. Families",
        "of timm are tried where it is installed: `make coverage EXTRAS=demo,dev,timm`. A cache of the last tokens",
        "alone (a sliding window) cannot be made of a prompt that lost some of them; falcon's own attention takes one",
        "mask for all caches, and it is PyTorch that refuses. *skipped*: tokens that no rule can choose from.",
        "",
        *_rules(cells),
        "",
        *_caches(cells),
    ]
    return "\n".join(lines) + "\n"


def _rules(cells: dict[str, dict[str, str]]) -> list[str]:
    """The table of the library's rules, of the families that have cells of rules."""
    from core.test_family_rules import COORDINATES, OPTIONS

    names = sorted(OPTIONS)
    lines = [
        "## Rules",
        "",
        "The rules that drop tokens on the vision-language families: under `torch.compile`, of the program of",
        "`tokcompile.export`, and generating. *exact*: an oracle that reads the attention weights of the same model,",
        "written out, chooses the same tokens, and the run by hand on these gives the same bits; compiled, keeping",
        "everything under the rule leaves every bit as it is. *equal*: four steps are within 1e-4 of runs by hand",
        "that have no cache. *refused* is an error that says why.",
        "",
        "| family | " + " | ".join(f"{name} | exported | generate" for name in names) + " |",
        "| --- " * (3 * len(names) + 1) + "|",
    ]
    for family, row in cells.items():
        if any(f"rule, {name}" in row for name in names):
            found = [cell for name in names for cell in _rule(row, name)]
            lines.append(f"| {family} | " + " | ".join(found) + " |")
    lines += [
        "",
        "Models without images in their text refuse all of them. Positions in time, height and width are kept, as they",
        "cannot be numbered anew: `random`, `divprune` and `hiprune` need `positions: keep` on",
        f"{', '.join(COORDINATES)}.",
    ]
    return lines


def _caches(cells: dict[str, dict[str, str]]) -> list[str]:
    """The table of the rules that evict, of the families that have cells of them."""
    from core.test_family_evict import CONTINUED, RULES
    from core.test_family_routes import ROUTES

    columns = [f"evict, {name}" for name in RULES] + [f"evict generates, {name}" for name in CONTINUED]
    columns += [f"route, {name}" for name in ROUTES]
    heads = [*RULES, *(f"{name}, generate" for name in CONTINUED), *ROUTES]
    lines = [
        "## Caches",
        "",
        "The rules that evict keys after a prompt, on the families with a decoder. *exact*: the method's naive form,",
        "given the model's own keys and the attention weights that it returns when its attention is written out, keeps",
        "the same keys of each layer, row and head; these are the model's to the last bit, and so are the prompt's",
        "logits, from one graph. *generate*: three tokens are within 1e-4 of the whole model when what was evicted is",
        "hidden from it. *refused* is an error that says why; an empty cell was not tried. Layers that attend in a",
        "window keep what that holds.",
        "",
        "`ems` merges keys as they are cached (`space: turned`): what it keeps is the model's to the last bit, what it",
        "merges is within 2e-5 of the naive form. Under `dapq` the model's own are those of the prompt with the same",
        "tokens behind it. `tokenselect` and `fasa` keep all keys and choose in each step which ones to attend to:",
        "*equal* says of two steps what *generate* says, where all but the choice of the naive form is hidden.",
        "Positions are those of the text (`positions: keep`) wherever a rule has a say in them.",
        "",
        f"| family | {' | '.join(heads)} |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for family, row in cells.items():
        if any(column in row for column in columns):
            lines.append(f"| {family} | " + " | ".join(row.get(column, "") for column in columns) + " |")
    return lines


def _rule(row: dict[str, str], name: str) -> tuple[str, str, str]:
    """The cells of a rule: compiled, and with what keeping everything gave if that is otherwise; exported; steps."""
    dropped = row.get(f"rule, {name}", "")
    everything = row.get(f"rule keeps all, {name}", dropped)
    compiled = dropped if everything == dropped else f"{dropped}; keep all: {everything}"
    return compiled, row.get(f"rule exported, {name}", ""), row.get(f"rule generates, {name}", "")


def complete(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """What was found now; a family that needs a module which is missing here keeps what was found elsewhere.

    In the order of the catalogue.
    """
    from tokcompile.models.catalogue import families

    needs = {name: family.needs for name, family in families().items()}
    kept = {name: before.get(name, row) if unloaded.missing(needs.get(name, "")) else row for name, row in now.items()}
    return {name: kept[name] for name in sorted(kept, key=list(needs).index)}


def lost(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """Cells that were exact, or equal, and are not."""
    return [
        f"{family}: {column} was {value}, is {now.get(family, {}).get(column, 'gone')}"
        for family, row in before.items()
        for column, value in row.items()
        if value in HELD and now.get(family, {}).get(column) != value
    ]


def main(some: str = "") -> int:
    """Run, write, compare.

    Args:
        some: an expression as of `pytest -k`: other cells stay as they are recorded.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    unloaded.declare_operators()  # before anything of transformers is imported
    results = Results()
    files = [str(ROOT / "tests" / "core" / name) for name in FILES]
    beside = ["-n", "2", "--dist", "loadfile"]  # subjects of a file are shared by its tests
    pytest.main(["-q", *beside, "-m", "slow or not slow", *(("-k", some) if some else ()), *files], plugins=[results])
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    found = {name: {**before.get(name, {}), **row} for name, row in results.cells.items()} if some else results.cells
    cells = complete(before, {**before, **found} if some else found)
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
    sys.exit(main(*sys.argv[1:2]))
