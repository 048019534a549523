"""The tables of figures of a GPU: what they say follows from what was measured, and what was not is said."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_speed
import pytest
from gpu_speed import ENDS, MISSING, PAGE, RESULTS

from tokcompile.models import zoo
from tokcompile.rulefile import load_rule

ABOUT = {"date": "2026-01-02", "command": "tokred bench", "device": "a GPU", "versions": {"torch": "2.11"}}
TARGETS = {
    **ABOUT,
    "targets": [
        {"name": "a / b", "case": "4", "limit": 1.8, "at_most": True, "ratio": 1.5, "why": "", "holds": True},
        {"name": "c / d", "case": "5", "limit": 8, "at_most": False, "ratio": None, "why": "no memory", "holds": False},
    ],
}
ROW = {"op": "attend", "dtype": "bfloat16", "size": 1, "moved": 2e6, "held": 1, "kernel": 2.0, "reference": 5.0}
KERNELS = {**ABOUT, "rows": [{**ROW, "share": 0.8, "others": {"sdpa": 3.0, "flex": "no memory"}}]}


def end(ideal: str) -> dict[str, object]:
    times = {"eager": (8.0, 4.0), "full": (6.0, 3.0), "ruled": (4.0, 2.0), "ideal": (3.2, 1.6)}
    ways = [{"name": n, "prefill": p, "decode": d, "peak": 5e6, "kept": [1, 1]} for n, (p, d) in times.items()]
    return {**ABOUT, "ways": ways, "prompt": 32768, "ideal": ideal}


def test_the_page_says_what_was_measured() -> None:
    page = PAGE.read_text()
    assert gpu_speed.written(page, gpu_speed.sections(gpu_speed.results(RESULTS))) == page


def test_what_is_not_measured_is_said() -> None:
    made = gpu_speed.sections({})
    assert all("not yet measured" in line for name in ("targets", "kernels") for line in made[name][:1])
    rows = [line for line in made["targets"] if line.startswith("| ")][2:]
    assert len(rows) > 20 and all(MISSING in row for row in rows)
    assert sum(MISSING in row for row in made["models"]) == len(ENDS)


def test_figures_become_ratios() -> None:
    made = gpu_speed.sections({"targets": TARGETS, "kernels-attend": KERNELS, ENDS[0].name: end("replayed")})
    assert "`tokred bench`, 2026-01-02, a GPU, torch 2.11." in made["targets"][0]
    assert "| a / b | 4 | at most 1.8 | 1.50 | yes |" in made["targets"]
    assert "| c / d | 5 | at least 8 | no memory | no |" in made["targets"]
    assert "| `attend` | bfloat16 | 2.0 | 2.000 | 2.50 | 80% | sdpa 1.50, flex failed |" in made["kernels"]
    wanted = "| 32,768 | 2.00 | 1.50 | 1.25 | 2.00 | 1.50 | 1.25 | 5 | 5 | 5 |"
    assert sum(wanted in row for row in made["models"]) == 1


def test_a_short_prompt_is_no_ideal_of_a_prompt() -> None:
    made = gpu_speed.sections({ENDS[3].name: end("short")})
    assert any("| 2.00 | 1.50 |  | 2.00 | 1.50 | 1.25 |" in row for row in made["models"])


def test_a_run_goes_on_where_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(part: str, folder: Path) -> dict[str, object]:
        asked.append(part)
        return {"targets": TARGETS, "kernels-attend": KERNELS}.get(part, {"ok": False, "error": "no memory"})

    monkeypatch.setattr(gpu_speed, "measure", measure)
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    words = ["--results", str(tmp_path), "--page", str(page), "--only", "targets", "kernels-attend", ENDS[0].name]
    gpu_speed.main([*words, "--seconds", "-1"])
    assert asked == []
    gpu_speed.main(words)
    gpu_speed.main(words)
    assert asked == ["targets", "kernels-attend", ENDS[0].name, ENDS[0].name]
    assert json.loads((tmp_path / "table.json").read_text())["devices"] == {"a GPU": {"attend": {"bfloat16": 1}}}
    assert json.loads((tmp_path / "targets.json").read_text()) == TARGETS
    assert "| a / b | 4 | at most 1.8 | 1.50 | yes |" in page.read_text()


def test_parts_are_commands(tmp_path: Path) -> None:
    """Of models and rules that there are; without a GPU each says so."""
    for each in ENDS:
        assert each.model.removeprefix("zoo:") in zoo.names()
        options = dict(word.split("=", 1) for word in each.words if "=" in word)
        load_rule(each.rule).bind(**options)
    assert gpu_speed.command("kernels-attend")[2:4] == ["--op", "attend"]
    found = gpu_speed.measure("targets", tmp_path)
    assert "targets" in found or "there is none here" in json.dumps(found["error"])
    assert found["command"] == "tokred bench --targets --json"
