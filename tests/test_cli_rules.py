"""The commands on rules: tables for people, JSON for programs, errors for both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokcompile.cli import app
from tokcompile.rulefile import load_rule, rule_names
from tokcompile.steps import STEPS

RUN = CliRunner()
SCREEN = 40


def test_rules_lists_the_library() -> None:
    result = RUN.invoke(app, ["rules"])
    assert result.exit_code == 0
    for name in rule_names():
        assert name in result.stdout
    assert "keep=1/3" in result.stdout
    assert "\x1b" not in result.stdout


def test_rules_as_json() -> None:
    rules = json.loads(RUN.invoke(app, ["rules", "--json"]).stdout)
    assert [rule["rule"] for rule in rules] == rule_names()
    assert all(rule["params"] for rule in rules)


@pytest.mark.parametrize("name", rule_names())
def test_show_explains_a_rule_in_a_screen(name: str) -> None:
    result = RUN.invoke(app, ["show", name])
    assert result.exit_code == 0
    rule = load_rule(name)
    assert rule.file.about in result.stdout
    assert all(option in result.stdout for option in rule.params)
    assert sum(line.startswith(tuple(STEPS)) for line in result.stdout.splitlines()) >= len(rule.steps)
    assert len(result.stdout.splitlines()) <= SCREEN
    assert rule.source.rstrip() in RUN.invoke(app, ["show", name, "--source"]).stdout
    data = json.loads(RUN.invoke(app, ["show", name, "--json"]).stdout)
    assert data["rule"] == name
    (verb,) = data["steps"][-1]
    assert not STEPS[verb].makes


def test_check_says_what_is_odd(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "rule: mine\nabout: x\nsteps:\n"
        "  - score: {name: s, by: norm, at: decoder.1.input}\n"
        "  - select: {name: a, by: topk, scores: s, keep: 3}\n"
        "  - select: {name: b, by: neighbours, of: a}\n"
        "  - drop: {at: decoder.1.input, keep: a}\n"
    )
    result = RUN.invoke(app, ["check", str(path)])
    assert result.exit_code == 0
    assert f"warning: {path}:6: selection 'b' is never used" in result.stdout
    data = json.loads(RUN.invoke(app, ["check", str(path), "--json"]).stdout)
    assert data["ok"]
    assert len(data["warnings"]) == 1


def test_an_error_goes_to_stderr_and_exits_with_1(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("rule: mine\nabout: x\nsteps:\n  - draft: {}\n")
    result = RUN.invoke(app, ["check", str(path)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"at: {path}:4" in result.stderr
    assert "try: available: tap, score, select, drop" in result.stderr


def test_an_error_as_json() -> None:
    result = RUN.invoke(app, ["show", "nothing", "--json"])
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert not data["ok"]
    assert data["error"]["cause"] == "there is no rule 'nothing'"
    assert "known: " in data["error"]["remedy"]


def test_json_works_on_either_side_of_the_argument() -> None:
    assert json.loads(RUN.invoke(app, ["show", "--json", rule_names()[0]]).stdout)["rule"] == rule_names()[0]
