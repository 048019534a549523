"""What `tokred sweep` runs: rules by budgets on the trained model, each cell written down as soon as it is known."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import yaml
from rich.progress import Progress

from tokcompile.binding import KEEP, RuleInstance
from tokcompile.budget import Budget
from tokcompile.demo import MODEL, answers_of, image_token_of
from tokcompile.demo_bench import Bench
from tokcompile.demo_data import SEED, Questions, digit_questions
from tokcompile.errors import RuleError, TokredError
from tokcompile.lowering.lower import TARGETS
from tokcompile.report import Part, explain_captured, versions
from tokcompile.rulefile import Rule, load_rule, rule_names

KEEPS = ("100%", "66%", "50%", "33%", "22%", "11%")
UNPRUNED = "unpruned"
C = TypeVar("C")


@dataclass(frozen=True)
class Settings:
    """What one sweep runs.

    Attributes:
        rules: names or paths; none for every rule of the library that takes `keep`.
        keeps: budgets, as a rule takes them.
        images: test images, one question each.
        seed: of the images.
        batch: images in a batch.
        target: `eager`, which spends no time on compiling, or another of `lower.TARGETS`.
    """

    rules: tuple[str, ...] = ()
    keeps: tuple[str, ...] = KEEPS
    images: int = 1000
    seed: int = SEED
    batch: int = 32
    target: str = "eager"


@dataclass(frozen=True)
class Cell:
    """One rule at one budget.

    Attributes:
        key: of all that the figures depend on; what is known under a key is not computed again.
        refused: why the rule cannot do this, and then there are no figures.
        right: right answers.
        image_tokens: that the rule chose, of each image.
        fed: tokens that the last block of the decoder has beyond those of the prompt's text: chosen and further ones.
        tokens: by block of the decoder.
        flops: of the decoder's blocks and of what the rule inserted, for one image.
        seconds: that the cell took.
    """

    key: str
    rule: str
    keep: str
    images: int
    refused: str = ""
    right: int = 0
    image_tokens: int = 0
    fed: int = 0
    tokens: tuple[int, ...] = ()
    flops: int = 0
    seconds: float = 0.0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.right / self.images

    @property
    def error(self) -> float:
        """Standard error of the accuracy, of a binomial distribution: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.images)

    def to_dict(self) -> dict[str, Any]:
        """The cell as plain data."""
        figures = {} if self.refused else {"accuracy": self.accuracy, "standard_error": self.error}
        return {**asdict(self), **figures}


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        unpruned: the model as it is.
        cells: in the order of rules and budgets.
        computed: how many were not known before.
    """

    settings: Settings
    unpruned: Cell
    cells: tuple[Cell, ...]
    versions: dict[str, str]
    computed: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {
            "model": MODEL,
            "settings": asdict(self.settings),
            "versions": self.versions,
            "computed": self.computed,
            "unpruned": self.unpruned.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
        }


class Store(Generic[C]):
    """Cells by key in one JSON file, which is whole after each cell.

    Args:
        path: of the file; made when the first cell is known.
        fresh: forget what it holds.
        kind: the dataclass that its cells are of; it has a `key`, and tuples where JSON has lists.

    Raises:
        TokredError: the file is no file of cells.
    """

    def __init__(self, path: Path, fresh: bool = False, kind: type[C] = Cell) -> None:
        self.path, self.kind = path, kind
        self.cells: dict[str, C] = {}
        if not fresh and path.exists():
            self._read()

    def _read(self) -> None:
        try:
            for data in json.loads(self.path.read_text(encoding="utf-8"))["cells"]:
                cell = self.kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in data.items()})
                self.cells[cell.key] = cell
        except (ValueError, KeyError, TypeError) as error:
            raise TokredError(
                f"{self.path} does not hold the cells of a sweep",
                found=f"{type(error).__name__}: {error}"[:200],
                remedy="--fresh to write it anew, or another --out",
            ) from error

    def add(self, cell: C) -> None:
        """Write a cell down: all or nothing, whatever happens meanwhile."""
        self.cells[cell.key] = cell
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        text = json.dumps({"cells": [asdict(each) for each in self.cells.values()]}, indent=1)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.path)


def run(
    settings: Settings,
    store: Store,
    progress: Progress,
    *,
    model: torch.nn.Module | None = None,
    questions: Questions | None = None,
) -> Sweep:
    """Run what a store does not know yet.

    Args:
        progress: shows how far it is; may be disabled.
        model: another model than the trained one, with `questions` for it.

    Raises:
        RuleError: there is no such rule, it takes no `keep`, or a budget is none.
        TokredError: there is no such target.
    """
    _check(settings)
    rules = _rules(settings.rules)
    if model is None:
        from tokcompile.models import zoo

        model = zoo.load(MODEL.removeprefix("zoo:")).model
    if questions is not None:
        settings = replace(settings, images=len(questions))
    made = versions()
    about = {"images": settings.images, "seed": settings.seed, "target": settings.target, "versions": made}
    about |= {"weights": weights_digest(model), "questions": _digest_of(questions) if questions is not None else ""}
    wanted: list[tuple[str, str, RuleInstance | str]] = [(UNPRUNED, "", "")]
    wanted += [(rule.name, keep, _bound(rule, keep)) for rule in rules for keep in settings.keeps]
    keys = [_key(about, rule) for _, _, rule in wanted]
    missing = [key for key in dict.fromkeys(keys) if key not in store.cells]
    task = progress.add_task("", total=1 + len(missing))
    if missing:
        progress.update(task, description="capturing the model")
        work = _Work(model, settings, questions or digit_questions(settings.images, settings.seed))
        progress.advance(task)
        for (rule, keep, instance), key in zip(wanted, keys, strict=True):
            if key in store.cells:
                continue
            progress.update(task, description=f"{rule} {keep}")
            store.add(work.cell(key, rule, keep, instance))
            progress.advance(task)
    # A key knows what a rule does, not what its file or budget was called at the time.
    cells = [replace(store.cells[key], rule=r, keep=k) for (r, k, _), key in zip(wanted, keys, strict=True)]
    return Sweep(settings, cells[0], tuple(cells[1:]), made, len(missing))


def _check(settings: Settings) -> None:
    if settings.target not in TARGETS:
        raise TokredError(f"there is no target '{settings.target}'", remedy=f"known: {', '.join(TARGETS)}")
    for keep in settings.keeps:
        Budget.parse(keep)


def _rules(named: Sequence[str]) -> list[Rule]:
    """The rules that are named, each of which must have a budget; else all of the library that have one."""
    rules = [load_rule(name) for name in named or rule_names()]
    lacking = [rule for rule in rules if not rule.takes_keep]
    if named and lacking:
        raise RuleError(
            f"rule '{lacking[0].name}' has no option '{KEEP}', which a sweep sets",
            where=lacking[0].path,
            found=", ".join(lacking[0].params) or "no parameters",
            remedy=f"a rule with `{KEEP}`: {', '.join(n for n in rule_names() if load_rule(n).takes_keep)}",
        )
    return [rule for rule in rules if rule not in lacking]


def _bound(rule: Rule, keep: str) -> RuleInstance | str:
    """A rule with its budget, or why it cannot have that one."""
    try:
        return rule.bind(**{KEEP: yaml.safe_load(keep)})  # as options of a rule are read everywhere: 64 is a number
    except TokredError as error:
        return f"{rule.path} {keep}: {error}"


def _key(about: dict[str, Any], rule: RuleInstance | str) -> str:
    what = rule.fingerprint() if isinstance(rule, RuleInstance) else rule
    return hashlib.sha256(json.dumps([what, about], sort_keys=True).encode()).hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: names, types, shapes and bits."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _digest_of(questions: Questions) -> str:
    digest = hashlib.sha256()
    for value in (questions.input_ids, questions.pixel_values, questions.answers):
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


class _Work:
    """The model captured once, and the questions; computes cells."""

    def __init__(self, model: torch.nn.Module, settings: Settings, questions: Questions) -> None:
        self.questions, self.batch = questions, min(settings.batch, len(questions))
        row = questions.input_ids[0]
        self.text = int((row != image_token_of(model)).sum())
        torch._dynamo.reset()
        with torch.no_grad():
            self.bench = Bench(model, questions.rows(0, self.batch), settings.target)

    @torch.no_grad()
    def cell(self, key: str, rule: str, keep: str, instance: RuleInstance | str) -> Cell:
        """Rewrite the graph, answer all questions, and count."""
        start = time.perf_counter()
        cell = Cell(key, rule, keep, len(self.questions))
        if isinstance(instance, str) and instance:
            return replace(cell, refused=instance)
        program = self.bench.program.copy()
        try:
            (part,) = explain_captured([program], [instance] if isinstance(instance, RuleInstance) else [])
            answers = answers_of(self.bench.rewritten(program), self.questions, self.batch)
        except (TokredError, RuntimeError) as error:  # the second is what a graph raises that checks its inputs
            return replace(cell, refused=str(error))
        after = part.after
        cell = replace(cell, **_counted(part, self.text), right=int((answers == self.questions.answers).sum()))
        flops = (after.totals["decoder"] + after.totals["rule"]) // self.batch
        return replace(cell, flops=flops, seconds=time.perf_counter() - start)


def _counted(part: Part, text: int) -> dict[str, Any]:
    """Tokens after a rule: by block, beyond the text in the last, and those of the image that its last drop left.

    A drop counts the tokens that it chose from; a merge the whole sequence: then, what is beyond the text counts.
    """
    tokens = tuple(row.tokens for row in part.after.rows if row.stack == "decoder" and row.live)
    fed = tokens[-1] - text
    edits = [r for applied in part.applied for r in applied.steps if r.get("verb") in ("drop", "merge")]
    dropped = bool(edits) and edits[-1]["verb"] == "drop"
    return {"tokens": tokens, "fed": fed, "image_tokens": int(edits[-1]["to"]) if dropped else fed}
