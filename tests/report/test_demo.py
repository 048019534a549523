"""The demo on a tiny random model: the shape of its report, and that nothing separates a rule from its ideal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from rich.console import Console
from rich.progress import Progress
from test_explain import assert_self_contained

from tokcompile import demo
from tokcompile.applied import Applied
from tokcompile.demo_data import Questions, digit_questions
from tokcompile.models import digits
from tokcompile.pages import demo_page

RULES, KEEPS = ("hiprune",), ("1/4",)


@pytest.fixture(scope="module")
def result() -> demo.Result:
    given = tiny.inputs(6)
    questions = Questions(given["input_ids"], given["pixel_values"], given["input_ids"][:, -1])
    settings = demo.Settings(batch=4, rounds=2, warmup=1, rules=RULES, keeps=KEEPS, generate=2, target="eager")
    return demo.run(settings, Progress(disable=True), model=tiny.llava(), questions=questions)


def test_the_report_has_its_shape(result: demo.Result) -> None:
    report = json.loads(json.dumps(result.report))
    assert report["model"] == "zoo:llava-digits" and report["images"] == 6
    base = report["unpruned"]
    assert base.keys() >= {"accuracy", "image_tokens", "flops", "kv_bytes", "latency_ms"}
    assert base["latency_ms"].keys() == {"eager", "inductor"} and base["image_tokens"] == 16
    assert list(report["rules"]) == list(RULES)
    for budgets in report["rules"].values():
        assert list(budgets) == list(KEEPS)
        for case in budgets.values():
            assert case.keys() >= {
                "accuracy",
                "image_tokens",
                "flops",
                "kv_bytes",
                "latency_ms",
                "max_abs_diff_to_ideal",
            }
            assert list(case["latency_ms"]) == ["eager", "inductor", "tokred", "ideal"]
            assert all(ms > 0 for ms in case["latency_ms"].values())
            assert case["image_tokens"] == 4 and case["kv_bytes"] == base["kv_bytes"] * 10 // 22
            assert 0 <= case["accuracy"] <= 1


@pytest.mark.parametrize("rule", RULES)
def test_no_difference_to_the_ideal(result: demo.Result, rule: str) -> None:
    case = result.report["rules"][rule][KEEPS[0]]
    assert case["max_abs_diff_to_ideal_eager"] == 0
    assert case["max_abs_diff_to_ideal"] == 0
    assert case["generate_agrees"] == "2 of 2"


def test_pictures_show_what_was_kept(result: demo.Result) -> None:
    ids, token = result.questions.input_ids[0], result.image_token
    (case,) = result.cases
    patches = next(iter(case.kept.values()))[0]
    kept = demo_page.kept_patches(case, ids, 0, token)
    assert kept.shape == (16,) and torch.equal(kept.nonzero()[:, 0], patches)
    # The same in the decoder: the map counts the tokens of the prompt, of which <bos> comes before the image.
    part = demo.Part(case.part.before, applied=[Applied("x", [{"verb": "drop", "at": "decoder.1.input"}])])
    source = torch.cat([torch.tensor([0]), patches + 1, torch.arange(17, 22)])
    inside = demo.Case("x", "1/4", part, kept={"x/0": source[None]})
    assert torch.equal(demo_page.kept_patches(inside, ids, 0, token), kept)


def test_pages(result: demo.Result, tmp_path: Path) -> None:
    demo_page.write(result, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rules"].keys() == set(RULES)
    html = (tmp_path / "out" / "report.html").read_text()
    assert_self_contained(html)
    assert html.count("data:image/png;base64,") == 4 * (1 + len(result.cases))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(demo_page.render(result.report, plain=True))
    assert "hiprune 1/4" in console.export_text()


def test_questions_are_of_the_test_split() -> None:
    questions = digit_questions(70)
    again = digit_questions(70)
    assert len(questions) == 70 and torch.equal(questions.pixel_values, again.pixel_values)
    assert {questions.word(int(token)) for token in questions.answers} <= set(digits.DIGITS)
    assert questions.rows(64, 8)["input_ids"].shape == (8, 201)
    assert torch.equal(questions.rows(64, 8)["input_ids"][6:], questions.input_ids[:2])
