"""Merge steps of a rule file: which fields belong to which way to merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokcompile.errors import RuleError
from tokcompile.rulefile import load_rule

GOOD = """
rule: mine
about: Merge.
params:
  side: {type: int, default: 3, about: rows}
steps:
  - score: {name: size, by: norm, at: projector.input}
  - select: {name: stay, by: topk, scores: size, keep: 4}
  - tap: {name: keys, at: vision.features.attention, what: k}
  - merge: {STEP, at: projector.input, positions: compact}
"""
NEAREST = "by: nearest, keep: stay, like: keys, count: 2"


def _load(step: str, folder: Path) -> RuleError | None:
    path = folder / "mine.yaml"
    path.write_text(GOOD.replace("STEP", step))
    try:
        load_rule(path)
    except RuleError as error:
        assert error.where[0] == f"{path}:{10}"
        return error
    return None


@pytest.mark.parametrize(
    "step",
    [
        'by: pool, rows: "${side}"',
        "by: pool, rows: 3, columns: 2",
        NEAREST,
        f"{NEAREST}, content: sum, lead: true",
        "by: kmeans, count: 3, iterations: 5, seed: 1, normalise: false",
        "by: transport, keep: stay, hard: 0.1, write_back: true",
        'by: clips, keep: stay, clip: "${side}", ratio: 0.3, spread: 1.5, temperature: 0.1, iterations: 2',
    ],
)
def test_a_step_with_its_fields_is_good(step: str, tmp_path: Path) -> None:
    assert _load(step, tmp_path) is None


@pytest.mark.parametrize(
    ("step", "cause", "remedy"),
    [
        ("by: pool", "'by: pool' needs 'rows'", "add rows"),
        ("by: kmeans", "'by: kmeans' needs 'count'", "kmeans"),
        ("by: nearest, like: keys, count: 2", "'by: nearest' needs 'keep'", "selection"),
        ("by: nearest, keep: stay, count: 2", "'by: nearest' needs 'like'", "tap"),
        ("by: pool, rows: 2, count: 3", "does not use 'count'", "pairs, nearest, kmeans"),
        ("by: kmeans, count: 3, content: sum", "does not use 'content'", "nearest"),
        ("by: kmeans, count: 3, proportional: false", "does not use 'proportional'", "pairs"),
        ("by: clips, keep: stay, clip: 4", "'by: clips' needs 'ratio'", "share of the tokens"),
        ("by: clips, keep: stay, ratio: 0.3", "'by: clips' needs 'clip'", "frames of a clip"),
        ("by: clips, keep: stay, clip: 0, ratio: 0.3", "is not a number from 1 on", "at least 1"),
        ("by: clips, keep: stay, clip: 4, ratio: 30", "30 is no share", "from 0 to 1"),
        ("by: clips, keep: stay, clip: 4, ratio: 0.3, write_back: true", "does not use 'write_back'", "transport"),
        ("by: pool, rows: 0", "'rows: 0' of by: pool is not a number from 1 on", "at least 1"),
        ("by: kmeans, count: 0", "is not a number from 1 on", "at least 1"),
        ("by: kmeans, count: [1, 2]", "is not a number from 1 on", "whole number"),
        ("by: kmeans, count: 3, iterations: 0", "is not a number from 1 on", "at least 1"),
        (
            NEAREST.replace("keep: stay", "keep: size"),
            "'size' is a score, and 'keep' of 'merge' takes a selection",
            "stay",
        ),
        (NEAREST.replace("like: keys", "like: key"), "names no tap", "keys"),
        (f"{NEAREST}, content: median", "'median' is not one of its values", "average"),
        ("by: medoids, count: 3", "no way to merge is called 'medoids'", "kmeans"),
    ],
)
def test_a_step_that_cannot_work_is_refused(step: str, cause: str, remedy: str, tmp_path: Path) -> None:
    error = _load(step, tmp_path)
    assert error is not None
    assert cause in error.cause
    assert remedy in error.remedy
