"""What `tokred retrieval` runs: rules that evict keys, by budgets, on a model trained to find needles in long texts.

A prompt is compressed, and what its cache still knows is asked for in a second call. Questions are asked *before* the
compression, as the last tokens of the prompt, where rules that listen to the last queries hear them, or *after* it,
when it is too late to keep what they ask for. Beside that, the text goes on, which gives a perplexity.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from rich.progress import Progress
from torch import Tensor

from tokcompile import api
from tokcompile.binding import RuleInstance
from tokcompile.budget import Budget
from tokcompile.errors import RuleError, TokredError
from tokcompile.lowering.lower import TARGETS
from tokcompile.models import retrieval, zoo
from tokcompile.params import plain
from tokcompile.report import versions
from tokcompile.rulefile import Rule, load_rule, rule_names
from tokcompile.sweep import Store, weights_digest

MODEL = "zoo:llama-retrieval"
BUDGET = "budget"
BUDGETS = ("100%", "50%", "25%", "12%", "6%", "3%")
UNEVICTED = "none"
LAST = {"window": 1, "recent": 8}
"""Options that keep a number of last tokens, and the fewest that are given; they get at most half of a budget.

Rules that need not keep the last tokens may evict the question itself, which would then be what is measured.
"""
BANDS = 5
"""Parts of a text, of equal length, that needles are counted in by their depth."""
SEED = 3_000_000
STEP = 16
"""Tokens of the second call: a question, or words of the language. What it does not need is filled up behind."""


@dataclass(frozen=True)
class Settings:
    """What one run measures.

    Attributes:
        rules: names or paths; none for every rule of the library that evicts and takes a `budget`.
        budgets: of keys in each cached head, as a rule takes them: shares of the prompt, or counts.
        texts: how many.
        questions: how many are asked about each text before the compression, each in a prompt of its own; after it,
            one is asked about each needle.
        length: tokens of a prompt.
        needles: in each text.
        seed: of the texts.
        batch: prompts in a batch.
        target: `eager`, which spends no time on compiling, or another of `lower.TARGETS`.
    """

    rules: tuple[str, ...] = ()
    budgets: tuple[str, ...] = BUDGETS
    texts: int = 128
    questions: int = 2
    length: int = 512
    needles: int = 8
    seed: int = SEED
    batch: int = 32
    target: str = "eager"


@dataclass(frozen=True)
class Cell:
    """One rule at one budget.

    Attributes:
        key: of all that the figures depend on; what is known under a key is not computed again.
        options: of the rule, beside its budget, that are not its defaults.
        refused: why the rule cannot do this, and then there are no figures.
        kept: keys in a cached head after the prompt, by block.
        before, before_asked: right answers and questions asked before the compression, by the needle's depth.
        after, after_asked: the same for questions asked after it.
        loss, loss_error: nats per word where the text goes on after the compression, and the standard error over texts.
        seconds: that the cell took.
    """

    key: str
    rule: str
    budget: str
    options: str = ""
    refused: str = ""
    kept: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    before_asked: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    after_asked: tuple[int, ...] = ()
    loss: float = 0.0
    loss_error: float = 0.0
    seconds: float = 0.0

    @property
    def perplexity(self) -> float:
        """Of the words that go on after the compression."""
        return math.exp(self.loss)

    def accuracy(self, when: str, band: int | None = None) -> tuple[float, float]:
        """Share of right answers and its standard error, sqrt(p (1 - p) / n).

        Args:
            when: `before` or `after`, the questions that are counted.
            band: a part of the texts by depth; all of them by default.
        """
        right, asked = getattr(self, when), getattr(self, f"{when}_asked")
        right, asked = (sum(right), sum(asked)) if band is None else (right[band], asked[band])
        share = right / asked
        return share, math.sqrt(share * (1 - share) / asked)


@dataclass(frozen=True)
class Found:
    """A finished run.

    Attributes:
        checkpoint: SHA-256 of the trained model's file of weights; empty for another model.
        unevicted: the model as it is.
        cells: in the order of rules and budgets.
        computed: how many were not known before.
    """

    settings: Settings
    checkpoint: str
    unevicted: Cell
    cells: tuple[Cell, ...]
    versions: dict[str, str]
    computed: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON."""
        return {**asdict(self), "model": MODEL}


def run(settings: Settings, store: Store[Cell], progress: Progress, *, model: torch.nn.Module | None = None) -> Found:
    """Run what a store does not know yet.

    Args:
        progress: shows how far it is; may be disabled.
        model: another model than the trained one, of the same vocabulary.

    Raises:
        RuleError: there is no such rule, it evicts nothing or takes no `budget`, or a budget is none.
        TokredError: there is no such target, or texts have no room for their needles.
    """
    rules = _rules(settings)
    checkpoint = checkpoint_digest() if model is None else ""
    model = zoo.load(MODEL.removeprefix("zoo:")).model if model is None else model
    about = {name: value for name, value in asdict(settings).items() if name not in ("rules", "budgets")}
    about |= {"versions": versions(), "weights": weights_digest(model)}
    wanted: list[tuple[str, str, RuleInstance | None]] = [(UNEVICTED, "", None)]
    for rule in rules:
        wanted += [(rule.name, b, rule.bind(**fitted(rule, b, settings.length))) for b in settings.budgets]
    keys = [_key(about, instance) for _, _, instance in wanted]
    missing = [key for key in dict.fromkeys(keys) if key not in store.cells]
    task = progress.add_task("", total=len(missing))
    work = _Work(model, settings)
    for (rule, budget, instance), key in zip(wanted, keys, strict=True):
        if key in store.cells:
            continue
        progress.update(task, description=f"{rule} {budget}")
        store.add(work.cell(Cell(key, rule, budget), instance))
        progress.advance(task)
    # A key knows what a rule does, not what its file or budget was called at the time.
    cells = [replace(store.cells[key], rule=r, budget=b) for (r, b, _), key in zip(wanted, keys, strict=True)]
    return Found(settings, checkpoint, cells[0], tuple(cells[1:]), about["versions"], len(missing))


def checkpoint_digest() -> str:
    """SHA-256 of the trained model's file of weights."""
    return hashlib.sha256((zoo.RETRIEVAL / "model.safetensors").read_bytes()).hexdigest()


def evicting() -> list[str]:
    """The rules of the library that evict keys down to a `budget`."""
    return [name for name in rule_names() if _evicts(load_rule(name))]


def fitted(rule: Rule, budget: str, length: int) -> dict[str, Any]:
    """Options of a rule for prompts of `length` tokens: its budget, and some last tokens, at most half of it.

    Raises:
        RuleError: the budget is none.
    """
    half = max(1, Budget.parse(budget).count(length) // 2)
    options: dict[str, Any] = {BUDGET: yaml.safe_load(budget)}  # as options of a rule are read everywhere
    for name, fewest in LAST.items():
        default = rule.params[name].default if name in rule.params else None
        if isinstance(default, int) and (fits := min(max(default, fewest), half)) != default:
            options[name] = fits
    return options


def _rules(settings: Settings) -> list[Rule]:
    """The rules that are named, or all that evict, of settings that make sense."""
    if settings.target not in TARGETS:
        raise TokredError(f"there is no target '{settings.target}'", remedy=f"known: {', '.join(TARGETS)}")
    room = (settings.length - 3) // retrieval.NEEDLE
    if not 0 < settings.needles <= min(room, len(retrieval.WORDS)):
        raise TokredError(f"{settings.needles} needles in prompts of {settings.length} tokens", remedy="longer prompts")
    if not 0 < settings.questions <= settings.needles:
        raise TokredError(f"{settings.questions} questions about {settings.needles} needles", remedy="at most as many")
    rules = [load_rule(name) for name in settings.rules or evicting()]
    for rule in rules:
        if not _evicts(rule):
            raise RuleError(
                f"rule '{rule.name}' does not evict keys down to a '{BUDGET}'",
                where=rule.path,
                remedy=f"a rule that does: {', '.join(evicting())}",
            )
    return rules


def _evicts(rule: Rule) -> bool:
    return any(step.verb == "evict" for step in rule.steps) and BUDGET in rule.params


def _key(about: Mapping[str, Any], rule: RuleInstance | None) -> str:
    what = "" if rule is None else rule.fingerprint()
    return hashlib.sha256(json.dumps([what, about], sort_keys=True).encode()).hexdigest()


class _Work:
    """The model and the texts; computes cells.

    Prompts are equally long whether a question is their end or the text goes on there, so that one graph has them all,
    and so are second calls: a cell compiles two graphs.
    """

    def __init__(self, model: torch.nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.batch = min(settings.batch, settings.texts)

    @cached_property
    def texts(self) -> retrieval.Texts:
        s = self.settings
        return retrieval.texts("test", s.texts, s.length - 2, s.needles, s.seed, more=2 + STEP)

    @cached_property
    def spots(self) -> Tensor:
        """int64 [texts, questions]: the needles that are asked about before the compression, at all depths alike."""
        s = self.settings
        return (torch.arange(s.texts)[:, None] + torch.arange(s.questions) * s.needles // s.questions) % s.needles

    @torch.no_grad()
    def cell(self, cell: Cell, rule: RuleInstance | None) -> Cell:
        """Compress, ask and go on, under a rule or without one."""
        start = time.perf_counter()
        if rule is not None:
            cell = replace(cell, options=_changed(rule))
        try:
            with _compiled(self.model, rule, self.settings.target):
                figures = self._figures()
        except (TokredError, RuntimeError) as error:
            return replace(cell, refused=str(_ours(error)))
        return replace(cell, **figures, seconds=time.perf_counter() - start)

    def _figures(self) -> dict[str, Any]:
        before, after, losses, kept = [], [], [], ()
        for rows, new in self._rows():
            texts = self.texts.rows(rows)
            right, loss, kept = self._after(texts)
            after.append(right[:new])
            losses.append(loss[:new])
            before.append(self._before(texts, self.spots[rows])[:new])
        every = torch.arange(self.settings.needles).expand(len(self.texts), -1)
        loss = torch.cat(losses).double()
        error = float(loss.std()) / len(loss) ** 0.5 if len(loss) > 1 else 0.0
        return {
            "kept": kept,
            "before": self._by_depth(self.spots, torch.cat(before)),
            "before_asked": self._by_depth(self.spots, torch.ones_like(self.spots)),
            "after": self._by_depth(every, torch.cat(after)),
            "after_asked": self._by_depth(every, torch.ones_like(every)),
            "loss": float(loss.mean()),
            "loss_error": error,
        }

    def _rows(self) -> Iterator[tuple[Tensor, int]]:
        """Rows of a batch and how many of them are new: past the end it starts over, to fill a batch of fixed size."""
        count = len(self.texts)
        for start in range(0, count, self.batch):
            yield torch.arange(start, start + self.batch) % count, min(self.batch, count - start)

    def _after(self, texts: retrieval.Texts) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """Compress texts without a question, ask about each needle, and go on.

        Returns:
            Which needles were told right, bool [rows, needles]; nats per word, float [rows]; keys kept by block.
        """
        cache, _ = self._prompt(torch.cat([texts.input_ids, texts.more[:, :2]], dim=1))
        words = texts.more[:, 2:]
        logits = self._step(cache, words)[:, :-1]
        loss = F.cross_entropy(logits.transpose(1, 2), words[:, 1:], reduction="none").mean(1)
        told = []
        for needle in range(self.settings.needles):
            which = torch.full((len(texts), 1), needle)
            question, answer = texts.questions(which)[:, 0], texts.answers(which)[:, 0]
            said = self._step(cache, torch.cat([question, answer[:, :-1]], dim=1))[:, 1:].argmax(-1)
            told.append((said == answer).all(1))
        return torch.stack(told, dim=1), loss, tuple(layer.keys.shape[2] for layer in cache.layers)

    def _before(self, texts: retrieval.Texts, spots: Tensor) -> Tensor:
        """Compress texts with a question behind each: bool [rows, questions], which were answered right.

        The prompt itself attends to all keys and so says the first word of the answer; the compressed cache, the rest.
        """
        told = []
        for which in spots.split(1, dim=1):
            question, answer = texts.questions(which)[:, 0], texts.answers(which)[:, 0]
            cache, first = self._prompt(torch.cat([texts.input_ids, question], dim=1))
            rest = self._step(cache, answer[:, :-1]).argmax(-1)
            told.append((torch.cat([first[:, None], rest], dim=1) == answer).all(1))
        return torch.stack(told, dim=1)

    def _prompt(self, ids: Tensor) -> tuple[Any, Tensor]:
        """The cache that a prompt [rows, length] leaves, and the token that follows it, int64 [rows]."""
        places = torch.arange(ids.shape[1]).expand(len(ids), -1)
        mask = torch.ones_like(ids)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True, logits_to_keep=1)
        return out.past_key_values, out.logits[:, -1].argmax(-1)

    def _step(self, cache: Any, ids: Tensor) -> Tensor:
        """Logits [rows, T, V] of tokens [rows, T] after the prompt; the cache stays as it is."""
        length = self.settings.length
        places = torch.arange(length, length + STEP).expand(len(ids), -1)
        mask = torch.ones(len(ids), length + STEP, dtype=torch.long)
        filled = F.pad(ids, (0, STEP - ids.shape[1]), value=retrieval.EOS)
        out = self.model(
            input_ids=filled, attention_mask=mask, position_ids=places, past_key_values=copy.deepcopy(cache)
        )
        return out.logits[:, : ids.shape[1]]

    def _by_depth(self, spots: Tensor, counted: Tensor) -> tuple[int, ...]:
        """Sum what is counted of needles, [texts, m] each, by the part of the text that a needle begins in."""
        depth = self.texts.places.gather(1, spots) * BANDS // self.texts.input_ids.shape[1]
        return tuple(int(counted[depth == band].sum()) for band in range(BANDS))


@contextmanager
def _compiled(model: torch.nn.Module, rule: RuleInstance | None, target: str) -> Iterator[None]:
    """Compile a model under a rule, if there is one, for as long as it is needed."""
    if rule is None:
        yield
        return
    torch._dynamo.reset()
    try:
        options = {name: value for name, value in _plain(rule).items() if name != "rule"}
        api.compile(model, rule=rule.rule.path, target=target, dynamic=False, **options)
        yield
    finally:
        api.restore(model)
        torch._dynamo.reset()


def _plain(rule: RuleInstance) -> dict[str, Any]:
    """Values of a rule's parameters as a user writes them."""
    return {name: plain(value) for name, value in rule.params.items()}


def _changed(rule: RuleInstance) -> str:
    """Options beside the budget that are not the rule's defaults."""
    defaults = _plain(rule.rule.bind())
    return ", ".join(f"{n}={v}" for n, v in _plain(rule).items() if n != BUDGET and v != defaults[n])


def _ours(error: BaseException) -> BaseException:
    """The refusal behind an error in which Dynamo wraps it; the error itself if there is none."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, TokredError):
        inner = getattr(seen, "inner_exception", None)
        seen = inner if inner is not None else seen.__cause__
    return error if seen is None else seen
