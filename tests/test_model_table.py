"""`make coverage` fails when a cell that was exact is not."""

from __future__ import annotations

import json

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


def test_the_page_is_that_of_the_record() -> None:
    cells = json.loads(model_table.RECORD.read_text())
    text = model_table.PAGE.read_text()
    versions = text.partition("found (")[2].partition(")")[0]
    assert model_table.page(cells, versions) == text
