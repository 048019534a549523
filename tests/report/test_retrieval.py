"""`tokred retrieval`: its cells against runs by hand, going on after an interruption, refusals, its page."""

from __future__ import annotations

import copy
import json
import shutil
import xml.etree.ElementTree as ElementTree
from functools import partial
from pathlib import Path
from typing import Any

import cached
import pytest
import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn
from typer.testing import CliRunner

from tokcompile import retrieval as run
from tokcompile.cli import app
from tokcompile.errors import TokredError
from tokcompile.models import retrieval, zoo
from tokcompile.pages import retrieval_page
from tokcompile.rulefile import load_rule, rule_names

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parent.parent.parent
SMALL: dict[str, Any] = {"texts": 5, "questions": 2, "length": 72, "needles": 8, "batch": 3}
RULES, BUDGETS = ("random_kv", "snapkv"), ("100%", "25%")
COUNT = 18
SCORES: dict[str, tuple[Any, dict[str, int]]] = {
    "snapkv": (lambda block: partial(cached.votes, window=9, kernel=5), {"recent": 9}),
    "random_kv": (lambda block: partial(cached.luck, seed=0, block=block), {"recent": 8}),
}


def found_in(folder: Path, model: nn.Module | None = None, **changed: Any) -> run.Found:
    settings = run.Settings(**({"rules": RULES, "budgets": BUDGETS, **SMALL} | changed))
    store = run.Store(folder / "retrieval.json", kind=run.Cell)
    return run.run(settings, store, Progress(disable=True), model=model)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return zoo.load("llama-retrieval").model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrieval")


@pytest.fixture(scope="module")
def found(folder: Path) -> run.Found:
    return found_in(folder)


def cell_of(found: run.Found, rule: str, budget: str) -> run.Cell:
    (cell,) = [c for c in found.cells if (c.rule, c.budget) == (rule, budget)]
    return cell


def test_every_cell_is_there(found: run.Found) -> None:
    assert [(c.rule, c.budget) for c in found.cells] == [(r, b) for r in RULES for b in BUDGETS]
    assert found.computed == 5 and not any(c.refused for c in found.cells)
    assert found.unevicted.kept == (72,) * 3
    assert [c.kept for c in found.cells] == [(72,) * 3, (COUNT,) * 3] * 2
    assert [c.options for c in found.cells] == ["recent=8", "recent=8", "", "window=9"]
    assert all(sum(c.after_asked) == 5 * 8 and sum(c.before_asked) == 5 * 2 for c in found.cells)


@pytest.mark.parametrize("rule", RULES)
def test_all_keys_are_the_model_itself(rule: str, found: run.Found) -> None:
    whole, plain = cell_of(found, rule, "100%"), found.unevicted
    assert (whole.before, whole.after) == (plain.before, plain.after)
    assert whole.loss == pytest.approx(plain.loss, abs=1e-5)
    assert whole.loss_error == pytest.approx(plain.loss_error, abs=1e-5)


class ByHand:
    """A prompt, and what further tokens say when they see the keys that a rule leaves, by masks."""

    def __init__(self, rule: str, model: nn.Module, prompt: Tensor) -> None:
        self.model, self.prompt = model, prompt
        score, ends = SCORES[rule]
        with cached.observed(model) as calls, torch.no_grad():
            self.next = model(input_ids=prompt, use_cache=False).logits[:, -1].argmax(-1)
        real = torch.ones_like(prompt).bool().tolist()
        self.stay = cached.masks(cached.choices(calls, real, score, [COUNT] * 3, **ends), prompt.shape[1])

    def logits(self, more: Tensor) -> Tensor:
        tokens = self.prompt.shape[1]
        with cached.observed(self.model, self.stay, tokens), torch.no_grad():
            ids = torch.cat([self.prompt, more], dim=1)
            return self.model(input_ids=ids, use_cache=False).logits[:, tokens:]


@pytest.mark.parametrize("rule", RULES)
def test_a_cell_is_the_run_by_hand(rule: str, found: run.Found, model: nn.Module) -> None:
    texts = retrieval.texts("test", 5, 70, 8, run.SEED, more=18)
    cell = cell_of(found, rule, "25%")
    depth = texts.places * 5 // 70
    after, before, asked = [0] * 5, [0] * 5, [0] * 5
    hand = ByHand(rule, model, torch.cat([texts.input_ids, texts.more[:, :2]], 1))
    words = texts.more[:, 2:]
    loss = F.cross_entropy(hand.logits(words)[:, :-1].transpose(1, 2), words[:, 1:], reduction="none").mean(1)
    assert cell.loss == pytest.approx(float(loss.mean()), abs=1e-4)
    assert cell.loss_error == pytest.approx(float(loss.std()) / 5**0.5, abs=1e-4)
    for needle in range(8):
        question = torch.stack([torch.full((5,), retrieval.ASK), texts.keys[:, needle]], 1)
        told = hand.logits(torch.cat([question, texts.values[:, needle, :1]], 1))[:, 1:].argmax(-1)
        behind = ByHand(rule, model, torch.cat([texts.input_ids, question], 1))
        second = behind.logits(texts.values[:, needle, :1])[:, 0].argmax(-1)
        for row in range(5):
            band = int(depth[row, needle])
            after[band] += int(torch.equal(told[row], texts.values[row, needle]))
            if needle in (row, (row + 4) % 8):
                both = torch.stack([behind.next[row], second[row]])
                before[band] += int(torch.equal(both, texts.values[row, needle]))
                asked[band] += 1
    assert (list(cell.after), list(cell.before), list(cell.before_asked)) == (after, before, asked)


def test_nothing_is_computed_twice(found: run.Found, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run._Work, "cell", None)
    again = found_in(folder)
    assert again == found and again.computed == 0


def test_an_interrupted_run_goes_on(found: run.Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {c.key: c for c in (found.unevicted, *found.cells)}
    computed: list[str] = []

    def cell(self: Any, cell: run.Cell, rule: Any) -> run.Cell:
        if len(computed) == 2 and not resumed:
            raise KeyboardInterrupt
        computed.append(cell.key)
        return known[cell.key]

    resumed = False
    monkeypatch.setattr(run._Work, "cell", cell)
    with pytest.raises(KeyboardInterrupt):
        found_in(tmp_path)
    assert len(json.loads((tmp_path / "retrieval.json").read_text())["cells"]) == 2
    resumed = True
    done = found_in(tmp_path)
    assert done == found and done.computed == 3 and len(set(computed)) == 5


def test_what_a_cell_depends_on(
    found: run.Found, folder: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run._Work, "cell", lambda self, cell, rule: cell)
    changes = [{"texts": 4}, {"questions": 1}, {"length": 80}, {"needles": 2}, {"seed": 1}, {"target": "aot_eager"}]
    assert [found_in(folder, **change).computed for change in changes] == [5] * len(changes)
    assert found_in(folder, budgets=("18", "25%")).computed == 2, "18 keys are written otherwise than 25 %"
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    assert found_in(folder, model=other).computed == 5


def test_every_rule_that_evicts_is_measured_by_default() -> None:
    names = run.evicting()
    assert {"snapkv", "h2o", "random_kv"} <= {*names} and "hiprune" not in names
    for name in rule_names():
        verbs = {step.verb for step in load_rule(name).steps}
        assert (name in names) == ("evict" in verbs and "budget" in load_rule(name).params)


@pytest.mark.parametrize("length", [512, 1024])
def test_last_tokens_stay_and_leave_room_for_others(length: int) -> None:
    def of(rule: str, budget: str) -> dict[str, Any]:
        return {name: value for name, value in run.fitted(load_rule(rule), budget, length).items() if name != "budget"}

    assert of("knorm", "50%") == {"recent": 8} and of("knorm", "3%") == {"recent": 7 if length == 512 else 8}
    assert of("h2o", "50%") == {"recent": length // 4}
    assert of("snapkv", "3%") == {"window": length * 3 // 100 // 2} and of("snapkv", "1") == {"window": 1}
    assert of("snapkv", "100%") == {} and run.fitted(load_rule("snapkv"), "100%", length) == {"budget": "100%"}


REFUSES = """
rule: late
about: Evict keys of a block that the model has not.
params:
  budget: {type: ratio_or_count, default: 4, about: keys kept}
steps:
  - score:  {name: size, by: norm, at: decoder.9.cache, largest: false}
  - select: {name: kept, by: topk, scores: size, among: all, keep: "${budget}"}
  - evict:  {at: decoder.9.cache, keep: kept}
"""


def test_a_refused_rule_is_a_cell_with_the_reason(found: run.Found, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "retrieval.json", tmp_path)
    path = tmp_path / "late.yaml"
    path.write_text(REFUSES)
    done = found_in(tmp_path, rules=(str(path),), budgets=("25%",))
    assert "decoder" in done.cells[0].refused and "late.yaml" in done.cells[0].refused and not done.cells[0].kept
    page = retrieval_page.to_markdown(done)
    assert "Refused:" in page and "- late at 25%: " in page and f"| late | {retrieval_page.REFUSED} |" in page
    assert "By depth" not in page
    assert "no rule" in retrieval_page.to_svg(done) and ">late" not in retrieval_page.to_svg(done)


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        ({"budgets": ("150%",)}, "150%"),
        ({"rules": ("nothing",)}, "there is no rule 'nothing'"),
        ({"rules": ("hiprune",)}, "does not evict"),
        ({"target": "onnx"}, "there is no target 'onnx'"),
        ({"length": 32}, "8 needles in prompts of 32 tokens"),
        ({"questions": 9}, "9 questions about 8 needles"),
    ],
)
def test_settings_that_are_none(settings: dict[str, Any], cause: str, tmp_path: Path) -> None:
    with pytest.raises(TokredError, match=cause) as caught:
        found_in(tmp_path, **settings)
    assert caught.value.remedy and not (tmp_path / "retrieval.json").exists()


def test_the_page_and_its_plots(found: run.Found, tmp_path: Path) -> None:
    page, plot, depths = retrieval_page.write(found, tmp_path)
    text = page.read_text()
    assert f"]({plot.name})" in text and f"]({depths.name})" in text
    assert "| rule | 100% | 25% |" in text and "- snapkv: window=9 at 25%" in text and "| snapkv | 72 | 18 |" in text
    share = cell_of(found, "snapkv", "25%")
    right, asked = sum(share.after), sum(share.after_asked)
    error = (right / asked * (1 - right / asked) / asked) ** 0.5
    assert share.accuracy("after") == pytest.approx((right / asked, error))
    assert f"| {100 * right / asked:.1f} ± {100 * error:.1f} |" in text
    for path, make in ((plot, retrieval_page.to_svg), (depths, retrieval_page.to_depth_svg)):
        svg = path.read_text()
        root = ElementTree.fromstring(svg[svg.index("<svg") :])
        assert root.get("role") == "img" and "2 rules" in root.get("aria-label")
        shown = [each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text")]
        assert all(any(rule in words for words in shown) for rule in RULES)
        assert svg == make(found)


def test_the_command(found: run.Found, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "retrieval.json", tmp_path)
    words = ["retrieval", "--rules", "snapkv,random_kv", "--budgets", "25%", "--out", str(tmp_path)]
    words += [part for name in ("texts", "questions", "length", "batch") for part in (f"--{name}", str(SMALL[name]))]
    result = CliRunner().invoke(app, [*words, "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["computed"] == 0
    known = cell_of(found, "snapkv", "25%")
    assert [(c["rule"], c["budget"], tuple(c["kept"])) for c in data["cells"]][0] == ("snapkv", "25%", known.kept)
    again = CliRunner().invoke(app, words)
    assert "0 cells computed now" in again.stdout and "snapkv 25% 18" in " ".join(again.stdout.split())
    files = {"retrieval.json", "retrieval.md", "retrieval.svg", "retrieval_depth.svg"}
    assert {f.name for f in tmp_path.iterdir()} == files
    refused = CliRunner().invoke(app, ["retrieval", "--budgets", "0%", "--out", str(tmp_path), "--json"])
    assert refused.exit_code == 1 and "0%" in json.dumps(json.loads(refused.stdout)["error"])


def test_the_page_of_the_docs_is_of_the_committed_checkpoint() -> None:
    text = (ROOT / "docs" / "retrieval.md").read_text()
    assert run.checkpoint_digest()[:16] in text
    assert "| rule | " + " | ".join(run.BUDGETS) + " |" in text
    for rule in ("random_kv", "knorm", "keydiff", "snapkv", "pyramidkv", "h2o"):
        assert f"| {rule} | " in text
