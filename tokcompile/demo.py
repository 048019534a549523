"""What `tokred demo` runs: one trained model, three rules, two budgets; accuracy, cost, time, distance to the ideal."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import tokcompile
from tokcompile.demo_bench import Bench, Call, last_logits, time_interleaved
from tokcompile.demo_data import Questions, digit_questions
from tokcompile.recording import Recording
from tokcompile.report import Part, explain_captured, versions
from tokcompile.rulefile import load_rule

MODEL = "zoo:llava-digits"


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does; `generate` images are also answered by `model.generate`."""

    images: int = 512
    batch: int = 32
    rounds: int = 20
    warmup: int = 2
    rules: tuple[str, ...] = ("hiprune", "fastv", "random")
    keeps: tuple[str, ...] = ("1/3", "1/9")
    generate: int = 8
    target: str = "inductor"


@dataclass
class Case:
    """One rule at one budget, and what was found out about it."""

    rule: str
    keep: str
    part: Part
    calls: dict[str, Call] = field(default_factory=dict)
    answers: Tensor = field(default_factory=lambda: torch.empty(0))
    kept: dict[str, Tensor] = field(default_factory=dict)
    diff: float = 0.0
    diff_eager: float = 0.0
    generated: str = ""

    @property
    def drop(self) -> dict[str, Any]:
        """The record of the last drop: where it was, and how many tokens it left."""
        return next(s for s in reversed(self.part.applied[0].steps) if s["verb"] == "drop")

    @property
    def image_tokens(self) -> int:
        """Image tokens kept of each image."""
        return int(self.drop["to"])


@dataclass(frozen=True)
class Result:
    """The report, of the shape that report.json has, and what its pictures are drawn from."""

    report: dict[str, Any]
    cases: list[Case]
    questions: Questions
    answers: Tensor
    image_token: int


def run(
    settings: Settings, progress: Progress, *, model: torch.nn.Module | None = None, questions: Questions | None = None
) -> Result:
    """Run the demo.

    Args:
        model: another model than the trained one, with `questions` for it.
        progress: shows how far it is; may be disabled.
    """
    if model is None:
        from tokcompile.models import zoo

        model = zoo.load(MODEL.removeprefix("zoo:")).model
    questions = digit_questions(settings.images) if questions is None else questions
    timed = questions.rows(0, settings.batch)
    cases = len(settings.rules) * len(settings.keeps)
    task = progress.add_task("", total=4 + 2 * cases + settings.warmup + settings.rounds)

    def say(what: str) -> None:
        progress.update(task, description=what, advance=1)

    torch._dynamo.reset()
    with torch.no_grad():
        say("capturing the model")
        bench = Bench(model, timed, settings.target)
        say("compiling the unpruned model")
        plain = {"eager": last_logits(model), "inductor": bench.plain()}
        plain["inductor"](timed)
        say(f"answering {len(questions)} questions unpruned")
        answers = answers_of(plain["eager"], questions, settings.batch)
        done = [
            _case(bench, rule, keep, settings, questions, say) for rule in settings.rules for keep in settings.keeps
        ]
        calls = {("unpruned", name): call for name, call in plain.items()}
        calls |= {(case.rule, case.keep, name): call for case in done for name, call in case.calls.items()}
        latency = time_interleaved(calls, timed, settings.rounds, settings.warmup, say)
        say("comparing with generate")
        _generate(model, done, settings, questions)
    report = _report(settings, questions, done, answers, latency)
    return Result(report, done, questions, answers, image_token_of(model))


def _case(
    bench: Bench, rule: str, keep: str, settings: Settings, questions: Questions, say: Callable[[str], None]
) -> Case:
    """Compile a case in all its variants, compare with the ideal on the timed batch, and answer the questions."""
    say(f"{rule} {keep}: compiling")
    program = bench.program.copy()
    (part,) = explain_captured([program], [load_rule(rule).bind(keep=keep)])
    case, timed, recording = Case(rule, keep, part), questions.rows(0, settings.batch), Recording()
    # The timed variant records too: one small copy per call, against it. A variant of its own that records might
    # choose differently where scores tie to the last bit.
    case.calls["tokred"] = bench.recorded(program, settings.target, recording)
    logits = case.calls["tokred"](timed)
    case.kept = dict(recording.maps)
    case.calls["ideal"] = bench.ideal(program, settings.target, recording)
    case.diff = _max_diff(logits, case.calls["ideal"](timed))
    recording = Recording()
    case.calls["eager"] = bench.recorded(program, "eager", recording)
    logits = case.calls["eager"](timed)
    case.diff_eager = _max_diff(logits, bench.ideal(program, "eager", recording)(timed))
    say(f"{rule} {keep}: answering {len(questions)} questions")
    case.answers = answers_of(case.calls["tokred"], questions, settings.batch)
    return case


def _max_diff(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


def answers_of(call: Call, questions: Questions, batch: int) -> Tensor:
    """int64 [n]: the most likely token after each question, as greedy generation picks it."""
    parts = [call(questions.rows(start, batch)).argmax(-1) for start in range(0, len(questions), batch)]
    return torch.cat(parts)[: len(questions)]


def _generate(model: torch.nn.Module, cases: list[Case], settings: Settings, questions: Questions) -> None:
    """Let `model.generate` answer a few questions under each rule, as a check of the answers above."""
    count = min(settings.generate, len(questions))
    for case in [c for c in cases if c.keep == settings.keeps[-1]] if count else []:
        torch._dynamo.reset()
        tokcompile.compile(model, rule=case.rule, keep=case.keep, target="eager", dynamic=False)
        try:
            inputs = questions.rows(0, count)
            mask = torch.ones_like(inputs["input_ids"])
            out = model.generate(**inputs, attention_mask=mask, max_new_tokens=1, do_sample=False)
        finally:
            tokcompile.restore(model)
        agree = int((out[:, -1] == case.answers[:count]).sum())
        case.generated = f"{agree} of {count}"


def image_token_of(model: torch.nn.Module) -> int:
    """The token of a prompt that stands for a part of an image."""
    config = model.config
    return getattr(config, "image_token_index", None) or config.image_token_id


def _report(
    settings: Settings,
    questions: Questions,
    cases: list[Case],
    answers: Tensor,
    latency: Mapping[tuple[str, ...], list[float]],
) -> dict[str, Any]:
    median = {key: statistics.median(times) for key, times in latency.items()}
    right = _share(answers, questions)
    before, rows = cases[0].part.before, settings.batch
    rules: dict[str, dict[str, Any]] = {}
    for case in cases:
        entry = _case_report(case, questions, right, median, rows)
        entry["latency_quartiles_ms"] = {name: _quartiles(latency[case.rule, case.keep, name]) for name in case.calls}
        rules.setdefault(case.rule, {})[case.keep] = entry
    return {
        "model": MODEL,
        "images": len(questions),
        "unpruned": {
            "accuracy": right,
            "image_tokens": int(cases[0].drop["from"]),
            "flops": before.totals["decoder"] // rows,
            "flops_all": before.flops // rows,
            "kv_bytes": before.kv_bytes // rows,
            "latency_ms": {name: median["unpruned", name] for name in ("eager", "inductor")},
            "latency_quartiles_ms": {name: _quartiles(latency["unpruned", name]) for name in ("eager", "inductor")},
        },
        "rules": rules,
        "batch": settings.batch,
        "rounds": settings.rounds,
        "target": settings.target,
        "flops_are": "of the decoder's blocks, for one image",
        "kv_bytes_are": "for one image",
        "latency_is": "the median of one forward of a batch, with a cache; variants interleaved",
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _case_report(
    case: Case, questions: Questions, unpruned: float, median: Mapping[tuple[str, ...], float], rows: int
) -> dict[str, Any]:
    after = case.part.after
    own = {name: median[case.rule, case.keep, name] for name in ("eager", "tokred", "ideal")}
    latency = {
        "eager": own["eager"],
        "inductor": median["unpruned", "inductor"],
        "tokred": own["tokred"],
        "ideal": own["ideal"],
    }
    right = _share(case.answers, questions)
    return {
        "accuracy": right,
        "accuracy_kept": right / unpruned if unpruned else None,
        "image_tokens": case.image_tokens,
        "flops": after.totals["decoder"] // rows,
        "flops_all": after.flops // rows,
        "flops_of_the_rule": after.totals["rule"] // rows,
        "kv_bytes": after.kv_bytes // rows,
        "latency_ms": latency,
        "ratios": {
            "tokred/ideal": latency["tokred"] / latency["ideal"],
            "inductor/tokred": latency["inductor"] / latency["tokred"],
        },
        "max_abs_diff_to_ideal": case.diff,
        "max_abs_diff_to_ideal_eager": case.diff_eager,
        "generate_agrees": case.generated or None,
    }


def _quartiles(times: list[float]) -> list[float]:
    """First and third quartile: how far the machine's noise reaches."""
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return [first, third]


def _share(answers: Tensor, questions: Questions) -> float:
    return (answers == questions.answers).float().mean().item()
