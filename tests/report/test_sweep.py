"""The sweep on a tiny random model: its cells against answers by hand, going on after an interruption, refusals."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from rich.progress import Progress
from typer.testing import CliRunner

from tokcompile import sweep
from tokcompile.cli import app
from tokcompile.demo_data import Questions
from tokcompile.errors import RuleError, TokredError
from tokcompile.pages import plots, sweep_page
from tokcompile.rulefile import load_rule, rule_names

KEEPS = ("100%", "50%", "1/4")
IMAGES = 6


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny.llava()


@pytest.fixture(scope="module")
def questions(model: torch.nn.Module) -> Questions:
    """Half of the answers are the model's own, so that accuracy without a rule is one half."""
    given = tiny.inputs(IMAGES)
    with torch.no_grad():
        said = model(**given).logits[:, -1].argmax(-1)
    wrong = torch.arange(IMAGES) % 2
    return Questions(given["input_ids"], given["pixel_values"], (said + wrong) % 64)


def sweep_of(
    model: torch.nn.Module, questions: Questions, path: Path, *, fresh: bool = False, **settings: Any
) -> sweep.Sweep:
    settings = {"rules": ("hiprune", "random"), "keeps": KEEPS, "batch": 4} | settings
    store = sweep.Store(path / "sweep.json", fresh)
    return sweep.run(sweep.Settings(**settings), store, Progress(disable=True), model=model, questions=questions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweep")


@pytest.fixture(scope="module")
def found(model: torch.nn.Module, questions: Questions, folder: Path) -> sweep.Sweep:
    return sweep_of(model, questions, folder)


def test_every_cell_is_there(found: sweep.Sweep) -> None:
    assert [(c.rule, c.keep) for c in found.cells] == list(itertools.product(("hiprune", "random"), KEEPS))
    assert found.computed == 7 and not any(c.refused for c in found.cells)
    assert [c.image_tokens for c in found.cells] == [16, 8, 4] * 2
    assert [c.fed for c in found.cells] == [16, 8, 4] * 2
    assert [c.tokens for c in found.cells] == [(22,) * 3, (14,) * 3, (10,) * 3] * 2


def test_accuracy_and_its_error(found: sweep.Sweep) -> None:
    plain = found.unpruned
    assert (plain.right, plain.accuracy, plain.tokens, plain.fed) == (3, 0.5, (22, 22, 22), 16)
    assert plain.error == pytest.approx((0.5 * 0.5 / 6) ** 0.5)
    whole = [c for c in found.cells if c.keep == "100%"]
    assert [c.right for c in whole] == [3, 3] and [c.flops for c in whole] == [plain.flops] * 2
    assert sweep.Cell("", "", "", 8, right=8).error == 0


@pytest.mark.parametrize("rule", ["hiprune", "random"])
def test_a_cell_is_the_answers_of_the_compiled_model(
    rule: str, found: sweep.Sweep, model: torch.nn.Module, questions: Questions
) -> None:
    pruned = torch.compile(model, backend="tokred", options={"rule": rule, "keep": "1/4", "target": "eager"})
    with torch.no_grad():
        said = pruned(input_ids=questions.input_ids, pixel_values=questions.pixel_values).logits[:, -1].argmax(-1)
    (cell,) = [c for c in found.cells if (c.rule, c.keep) == (rule, "1/4")]
    assert cell.right == int((said == questions.answers).sum())


def test_nothing_is_computed_twice(
    found: sweep.Sweep, model: torch.nn.Module, questions: Questions, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "Bench", None)  # not even the model is captured
    again = sweep_of(model, questions, folder)
    assert again == found and again.computed == 0


def test_an_interrupted_sweep_goes_on(
    found: sweep.Sweep, model: torch.nn.Module, questions: Questions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[tuple[str, str]] = []
    inner = sweep._Work.cell

    def counted(self: Any, key: str, rule: str, keep: str, instance: Any) -> sweep.Cell:
        if len(computed) == 2 and not resumed:
            raise KeyboardInterrupt
        computed.append((rule, keep))
        return inner(self, key, rule, keep, instance)

    resumed = False
    monkeypatch.setattr(sweep._Work, "cell", counted)
    with pytest.raises(KeyboardInterrupt):
        sweep_of(model, questions, tmp_path)
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 2
    resumed = True
    done = sweep_of(model, questions, tmp_path)
    assert done.computed == 5 and len(computed) == len(set(computed)) == 7
    assert without_time(done) == without_time(found)
    assert [f.name for f in tmp_path.iterdir()] == ["sweep.json"]


def without_time(found: sweep.Sweep) -> list[Any]:
    return [{**c.to_dict(), "seconds": 0} for c in (found.unpruned, *found.cells)]


def test_fresh_forgets(model: torch.nn.Module, questions: Questions, tmp_path: Path) -> None:
    settings = {"rules": ("random",), "keeps": ("50%",)}
    assert sweep_of(model, questions, tmp_path, **settings).computed == 2
    assert sweep_of(model, questions, tmp_path, **settings, fresh=True).computed == 2
    assert sweep_of(model, questions, tmp_path, rules=("random",), keeps=("50%", "1/4")).computed == 1


def test_what_a_cell_depends_on(model: torch.nn.Module, questions: Questions, tmp_path: Path) -> None:
    settings = {"rules": ("random",), "keeps": ("50%",)}
    first = sweep_of(model, questions, tmp_path, **settings)
    other = tiny.llava()
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    fewer = Questions(questions.input_ids[:4], questions.pixel_values[:4], questions.answers[:4])
    changed = [
        sweep_of(other, questions, tmp_path, **settings),
        sweep_of(model, fewer, tmp_path, **settings),
        sweep_of(model, questions, tmp_path, **settings, seed=1),
        sweep_of(model, questions, tmp_path, **settings, target="aot_eager"),
    ]
    assert [each.computed for each in changed] == [2, 2, 2, 2]
    assert len({each.unpruned.key for each in (first, *changed)}) == 5


LATE = """
rule: late
about: Drop before a block that the model has not, or keep an odd number of tokens.
params:
  keep: {type: ratio_or_count, default: 4, about: image tokens kept}
steps:
  - score:  {name: size, by: norm, at: projector.output, p: 2}
  - select: {name: kept, by: topk, scores: size, among: image, keep: "${keep}"}
  - drop:   {at: decoder.9.input, keep: kept, positions: keep}
"""
COUNTS = LATE.replace("rule: late", "rule: counts").replace("ratio_or_count", "int").replace("9", "1")


def test_a_refused_rule_is_a_cell_with_the_reason(model: torch.nn.Module, questions: Questions, tmp_path: Path) -> None:
    for name, text in (("late", LATE), ("counts", COUNTS)):
        (tmp_path / f"{name}.yaml").write_text(text)
    names = (str(tmp_path / "late.yaml"), str(tmp_path / "counts.yaml"), "random")
    done = sweep_of(model, questions, tmp_path, rules=names, keeps=("50%", "4"))
    late, counts, other = (done.cells[i : i + 2] for i in (0, 2, 4))
    assert all("decoder" in c.refused and not c.tokens for c in late)
    assert counts[0].refused and not counts[1].refused and counts[1].image_tokens == 4
    assert not any(c.refused for c in other)
    page = sweep_page.to_markdown(done)
    assert "Refused:" in page and f"| late | {sweep_page.REFUSED} | {sweep_page.REFUSED} |" in page
    assert "- late at 50%, 4: " in page
    assert sweep_of(model, questions, tmp_path, rules=names, keeps=("50%", "4")).computed == 0


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"keeps": ("150%",)}, "150%"),
        ({"keeps": ("half",)}, "half"),
        ({"rules": ("nothing",)}, "there is no rule 'nothing'"),
        ({"target": "onnx"}, "there is no target 'onnx'"),
    ],
)
def test_settings_that_are_none(
    settings: dict[str, Any], cause: str, model: torch.nn.Module, questions: Questions, tmp_path: Path
) -> None:
    with pytest.raises(TokredError, match=cause) as caught:
        sweep_of(model, questions, tmp_path, **settings)
    assert caught.value.remedy and not (tmp_path / "sweep.json").exists()


def test_a_rule_without_a_budget(model: torch.nn.Module, questions: Questions, tmp_path: Path) -> None:
    path = tmp_path / "fixed.yaml"
    path.write_text(LATE.replace("keep: {type", "kept: {type").replace("${keep}", "${kept}"))
    with pytest.raises(RuleError, match="has no option 'keep'"):
        sweep_of(model, questions, tmp_path, rules=(str(path),))


def test_every_rule_with_a_budget_is_swept_by_default() -> None:
    names = [rule.name for rule in sweep._rules(())]
    assert names == [name for name in rule_names() if load_rule(name).takes_keep] and "random" in names


def test_a_file_that_holds_no_cells(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    path.write_text('{"cells": [{"rule": "x"}]}')
    with pytest.raises(TokredError, match="does not hold the cells"):
        sweep.Store(path)
    assert sweep.Store(path, fresh=True).cells == {}


def test_the_page(found: sweep.Sweep, tmp_path: Path) -> None:
    page, plot = sweep_page.write(found, tmp_path)
    text = page.read_text()
    assert "| rule | 100% | 50% | 1/4 |" in text and "without a rule 50.0 ± 20.4" in text
    assert "| hiprune | 16 (22) | 8 (14) | 4 (10) |" in text and f"]({plot.name})" in text
    marked = sweep.Cell("", "", "", 8, image_tokens=4, fed=7, tokens=(22, 13))
    assert sweep_page._tokens(marked) == "4 + 3" and sweep_page._mean(marked) == "18"


def test_the_plot(found: sweep.Sweep) -> None:
    svg = sweep_page.to_svg(found)
    root = ElementTree.fromstring(svg[svg.index("<svg") :])
    assert root.get("role") == "img" and "2 rules" in root.get("aria-label")
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"hiprune", "random"} <= {*texts}
    assert svg == sweep_page.to_svg(found)


def test_lines_look_different_without_colours() -> None:
    looks = itertools.islice(plots.looks(), 40)
    assert len({(look["marker"], str(look["linestyle"])) for look in looks}) == 40


def test_the_command(tmp_path: Path) -> None:
    words = [
        "sweep",
        "--rules",
        "random",
        "--keeps",
        "11%,100%",
        "--images",
        "8",
        "--batch",
        "8",
        "--out",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, [*words, "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["computed"] == 3
    assert [cell["keep"] for cell in data["cells"]] == ["11%", "100%"]
    assert data["cells"][0]["image_tokens"] == 21 and data["cells"][1]["right"] == data["unpruned"]["right"]
    again = CliRunner().invoke(app, words)
    assert "0 of them computed now" in again.stdout and "random 11%" in " ".join(again.stdout.split())
    assert {f.name for f in tmp_path.iterdir()} == {"sweep.json", "sweep.md", "sweep.svg"}


@pytest.mark.parametrize(
    ("words", "cause"),
    [(["--keeps", "0%"], "0%"), (["--rules", "x"], "there is no rule 'x'"), (["--target", "x"], "x")],
)
def test_errors_of_the_command(words: list[str], cause: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["sweep", *words, "--out", str(tmp_path), "--json"])
    assert result.exit_code == 1 and cause in json.dumps(json.loads(result.stdout)["error"])
