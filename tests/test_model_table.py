"""`make coverage` fails when a cell that was exact is not."""

from __future__ import annotations

import json
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import model_table
import pytest


@pytest.mark.parametrize("now", ["failed", "refused: why", "skipped"])
def test_a_lost_cell_is_named(now: str) -> None:
    before = {"llama": {"sites": "exact", "drop, decoder": "exact"}, "swin": {"drop, vision": "refused: windows"}}
    after = {"llama": {"sites": "exact", "drop, decoder": now}, "swin": {"drop, vision": "exact"}}
    assert model_table.lost(before, before) == []
    assert model_table.lost(before, after) == [f"llama: drop, decoder was exact, is {now}"]
    assert len(model_table.lost(before, {})) == 2


def test_a_family_that_cannot_be_built_here_keeps_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"llama": {"sites": "exact"}, "timm_vit": {"sites": "exact"}}
    now = {"llama": {"sites": "failed"}, "timm_vit": {"sites": "skipped"}}
    monkeypatch.setattr(model_table.unloaded, "missing", lambda module: "no" if module == "timm" else "")
    assert model_table.complete(before, now) == {**now, "timm_vit": before["timm_vit"]}
    monkeypatch.setattr(model_table.unloaded, "missing", lambda module: "")
    assert model_table.complete(before, now) == now


def _report(nodeid: str, outcome: str = "passed") -> Any:
    return SimpleNamespace(nodeid=f"tests/core/test_x.py::{nodeid}", when="call", outcome=outcome)


EXPORTED = "test_an_exported_program_under_a_rule_equals_the_run_by_hand_or_is_refused"
INPUTS = "test_a_drop_from_other_inputs_equals_the_run_by_hand_or_is_refused"
STEPS = "test_generate_under_a_rule_equals_a_run_by_hand"
DROP, ALL = "test_a_rule_equals_the_run_by_hand_or_is_refused", "test_keeping_everything_under_a_rule_keeps_every_bit"


def test_the_tests_that_are_read_are_there() -> None:
    tests = [import_module(f"core.{name.removesuffix('.py')}") for name in model_table.FILES]
    assert all(any(hasattr(module, name) for module in tests) for name in model_table.TESTS)


def test_a_cell_of_a_rule_is_recorded_shown_and_missed_when_lost() -> None:
    results = model_table.Results()
    for nodeid in (
        f"{DROP}[llava-fastv]",
        f"{ALL}[llava-fastv]",
        f"{DROP}[llava_next-hiprune]",
        f"{DROP}[llava-random]",
    ):
        results.pytest_runtest_logreport(_report(nodeid))
    results.pytest_runtest_logreport(_report(f"{ALL}[llava-random]", "failed"))
    results.pytest_runtest_logreport(_report(f"{EXPORTED}[llava-random]"))
    results.pytest_runtest_logreport(_report(f"{STEPS}[llava-fastv]"))
    results.pytest_runtest_logreport(_report("test_another[gpt2-fastv-no image tokens]"))
    cells = results.cells
    assert cells["llava"]["rule, fastv"] == cells["llava"]["rule keeps all, fastv"] == "exact"
    text = model_table.page(cells, "versions").partition("## Rules")[2]
    assert "| family | divprune | exported | generate | fastv | exported | generate | hiprune | exported |" in text
    assert "| llava |  |  |  | exact |  | equal |  |  |  | exact; keep all: failed | exact |  |" in text
    assert "| llava_next |  |  |  |  |  |  | refused: takes the token axis apart |  |  |  |  |  |" in text
    later = {**cells, "llava": {**cells["llava"], "rule, fastv": "failed"}}
    assert model_table.lost(cells, later) == ["llava: rule, fastv was exact, is failed"]


def test_a_cell_of_other_inputs_has_a_column_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    from core import test_family_inputs

    monkeypatch.setattr(test_family_inputs, "REFUSED", {("llava", "text"): "no \\d"})
    results = model_table.Results()
    for kind in ("two images", "text"):
        results.pytest_runtest_logreport(_report(f"{INPUTS}[llava-{kind}]"))
    assert results.cells == {"llava": {"two images": "exact", "text": "refused: no d"}}
    lines = model_table.page(results.cells, "versions").splitlines()
    head, row = (next(x for x in lines if x.startswith(f"| {name} ")) for name in ("family", "llava"))
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    assert [cells[kind] for kind in ("two images", "text", "video")] == ["exact", "refused: no d", ""]


def test_the_page_is_that_of_the_record() -> None:
    cells = json.loads(model_table.RECORD.read_text())
    text = model_table.PAGE.read_text()
    versions = text.partition("found (")[2].partition(")")[0]
    assert model_table.page(cells, versions) == text
