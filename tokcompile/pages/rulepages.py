"""What the command line shows of rules: as data for `--json`, and as tables for people."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tokcompile.binding import KEEP
from tokcompile.params import Param
from tokcompile.rulefile import Rule, load_rule, rule_names


def table(*columns: str, plain: bool) -> Table:
    """Return an empty table; plain ones have no frame, for pipes and files."""
    result = Table(box=None, pad_edge=False) if plain else Table()
    for column in columns:
        result.add_column(column, overflow="fold")
    return result


def library() -> list[Rule]:
    """Return every rule of the library."""
    return [load_rule(name) for name in rule_names()]


def summary(rule: Rule) -> dict[str, Any]:
    """Return a rule in a line, as data."""
    defaults = {name: param.default for name, param in rule.params.items()}
    return {"rule": rule.name, "about": rule.file.about, "params": defaults, "path": rule.path}


def page(rule: Rule) -> dict[str, Any]:
    """Return all of a rule, as data."""
    return {**rule.as_data(), "path": rule.path, "warnings": list(rule.warnings)}


def render_library(rules: list[Rule], plain: bool) -> RenderableType:
    """Return the table of `tokred rules`."""
    result = table("rule", "options", "what it does", plain=plain)
    for rule in rules:
        options = ", ".join(f"{name}={param.default}" for name, param in rule.params.items())
        result.add_row(rule.name, Text(options), Text(rule.file.about))
    return result


def render_page(rule: Rule, plain: bool, source: bool = False) -> RenderableType:
    """Return the page of `tokred show`: a screen, or with `source` all of the file, where comments give the reasons."""
    head = [Text(f"{rule.name}: {rule.file.about}", style="bold")]
    paper = rule.file.paper
    if paper:
        number = f"arXiv {paper.arxiv}" if paper.arxiv else paper.url
        head.append(Text(f"{paper.title}{f' ({number})' if number else ''}"))
    options = table("option", "type", "default", "paper", "what it does", plain=plain)
    for name, param in rule.params.items():
        shown = "" if param.paper is None else str(param.paper)
        options.add_row(name, _type(param), Text(str(param.default)), shown, Text(param.about))
    if rule.file.budget:
        sets = ", ".join(f"{name}: {text}" for name, text in rule.file.budget.items())
        options.add_row(KEEP, "ratio_or_count", "", "", Text(f"image tokens kept; sets {sets}"))
    below = [Text(rule.source.rstrip())] if source else [_steps(rule, plain), Text(), Text(f"file: {rule.path}")]
    return Group(*head, Text(), options, Text(), *below)


def _steps(rule: Rule, plain: bool) -> Table:
    """A line for each step: what it makes, and how."""
    shown = table("step", "name", "how", plain=plain)
    for step in rule.steps:
        given = {key: value for key, value in step.given().items() if key != "name"}
        how = ", ".join(f"{key}: {_flow(value)}" for key, value in given.items())
        shown.add_row(step.verb, getattr(step, "name", None) or "", Text(how))
    return shown


def _flow(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_flow, value))}]" if isinstance(value, tuple) else str(value)


def _type(param: Param) -> Text:
    if param.choices:
        return Text(" | ".join(map(str, param.choices)))
    low = "" if param.min is None else f" ≥ {param.min}"
    high = "" if param.max is None else f" ≤ {param.max}"
    return Text(param.type + low + high)
