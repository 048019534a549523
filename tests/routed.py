"""What routes attend to, by hand: a written-out attention that picks keys in every step, from a model's own q and k."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from attending import attending
from torch import Tensor, nn


@dataclass
class Layout:
    """A rotation as a model has it: frequencies, the first number that is turned, and which numbers are pairs."""

    frequencies: list[float]
    start: int = 0
    neighbours: bool = False

    def pair(self, i: int) -> tuple[int, int]:
        one = self.start + (2 * i if self.neighbours else i)
        return one, one + (1 if self.neighbours else len(self.frequencies))

    def turn(self, x: Tensor, by: int) -> Tensor:
        """Turn one vector by some positions, float64."""
        out = x.double().clone()
        for i, frequency in enumerate(self.frequencies):
            a, b = self.pair(i)
            cos, sin = math.cos(by * frequency), math.sin(by * frequency)
            out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
        return out


@dataclass
class Step:
    """One step of one row at one layer: its queries [H, m, D], all real keys [Hkv, n, D], which end with its own."""

    layer: int
    row: int
    query: Tensor
    key: Tensor


@dataclass
class Choice:
    """For each query head the keys that it attends to, ascending; and queries and keys as they are attended to."""

    keys: list[list[int]]
    query: Tensor
    key: Tensor


@dataclass
class Votes:
    """TokenSelect (Wu et al. 2024), by its algorithm, for one row at a time."""

    layout: Layout | None
    first: int
    middle: int
    last: int
    kernel: int = 1
    reuse: float = 2
    held: dict[tuple[int, int], tuple[Tensor, list[int]]] = field(default_factory=dict)
    chosen: list[tuple[int, int, list[int], bool]] = field(default_factory=list)

    def __call__(self, step: Step) -> Choice:
        heads, m, _ = step.query.shape
        n, group = step.key.shape[1], heads // step.key.shape[0]
        last = max(self.last, m)
        everything = list(range(n))
        if n <= self.first + self.middle + last:
            return self._placed(step, everything)
        summary = torch.stack([self._summary(step, h) for h in range(heads)])
        place = step.layer, step.row
        known = self.held.get(place)
        again = known is not None and _cosine(summary.flatten(), known[0].flatten()) >= self.reuse
        if again:
            middle = known[1]
        else:
            candidates = everything[self.first : n - last]
            votes = self.votes(step, summary, candidates, group)
            middle = sorted(sorted(candidates, key=lambda j: (-votes[j], j))[: self.middle])
            self.held[place] = summary, middle
        picks = [*everything[: self.first], *middle, *everything[n - last :]]
        self.chosen.append((*place, picks, again))
        return self._placed(step, picks)

    def votes(self, step: Step, summary: Tensor, candidates: list[int], group: int) -> dict[int, float]:
        found = dict.fromkeys(candidates, 0.0)
        for head in range(summary.shape[0]):
            keys = step.key[head // group]
            logits = [float(summary[head] @ self._bare(keys[j], j)) for j in candidates]
            top = max(logits)
            total = sum(math.exp(x - top) for x in logits)
            for j, x in zip(candidates, logits, strict=True):
                found[j] += math.exp(x - top) / total
        if self.kernel == 1:
            return found
        reach = self.kernel // 2
        return {j: max(found.get(i, 0.0) for i in range(j - reach, j + reach + 1)) for j in candidates}

    def _summary(self, step: Step, head: int) -> Tensor:
        n, m = step.key.shape[1], step.query.shape[1]
        each = step.query[head].double()
        if self.layout is not None:
            # The query of position p = n - m + i, turned to last + i.
            each = torch.stack([self.layout.turn(q, self.last - (n - m)) for q in each])
        return each.mean(0)

    def _bare(self, key: Tensor, position: int) -> Tensor:
        return key.double() if self.layout is None else self.layout.turn(key, -position)

    def _placed(self, step: Step, picks: list[int]) -> Choice:
        query, key = step.query.double(), step.key.double()
        heads, m, _ = query.shape
        if self.layout is not None:
            key = key.clone()
            for head in range(key.shape[0]):
                for rank, j in enumerate(picks):
                    key[head, j] = self.layout.turn(step.key[head, j], rank - j)
            by = (len(picks) - m) - (step.key.shape[1] - m)
            query = torch.stack([torch.stack([self.layout.turn(q, by) for q in each]) for each in step.query])
        return Choice([picks] * heads, query, key)


@dataclass
class Frequencies:
    """FASA (2026): the keys with the largest partial logits, for each query head or those that share a cached one."""

    layout: Layout
    table: list[list[list[int]]]
    keep: int
    sinks: int = 0
    recent: int = 0
    per: str = "kv_head"
    rest: tuple[int, ...] = ()
    chosen: list[tuple[int, int, list[list[int]]]] = field(default_factory=list)

    def __call__(self, step: Step) -> Choice:
        heads, m, _ = step.query.shape
        n, group = step.key.shape[1], heads // step.key.shape[0]
        own = max(self.recent, 1)
        last = max(own, m)
        keep = self.keep + last - own
        query = step.query.double().mean(1)
        if n <= keep:
            return Choice([list(range(n))] * heads, step.query.double(), step.key.double())
        picks = []
        for head in range(heads):
            of = head if self.per == "query_head" else head // group
            if self.per == "query_head" or group == 1:
                scores = self.scores(query[head], step.key[head // group], self.table[step.layer][of])
            else:
                each = [
                    _standard(self.scores(query[h], step.key[of], self.table[step.layer][of]))
                    for h in range(of * group, (of + 1) * group)
                ]
                scores = [sum(column) for column in zip(*each, strict=True)]
            forced = {j for j in range(n) if j < self.sinks or j >= n - last}
            others = sorted((j for j in range(n) if j not in forced), key=lambda j: (-scores[j], j))
            picks.append(sorted([*forced, *others[: keep - len(forced)]]))
        self.chosen.append((step.layer, step.row, picks))
        return Choice(picks, step.query.double(), step.key.double())

    def scores(self, query: Tensor, keys: Tensor, chosen: list[int]) -> list[float]:
        numbers = [number for i in chosen for number in self.layout.pair(i)] + list(self.rest)
        return [sum(float(query[d]) * float(key[d]) for d in numbers) for key in keys]


def _standard(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values))
    return [(x - mean) / spread for x in values]


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


@contextmanager
def routed(
    model: nn.Module, steps: Sequence[tuple[int, int]], real: list[list[bool]], choose: Callable[[Step], Choice]
) -> Iterator[None]:
    """Let a model attend to chosen keys in some steps, each from a token to another, in one forward of all tokens.

    Args:
        real: for each row and token whether it is real.
    """

    def change(layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
        group = query.shape[1] // key.shape[1]
        for (start, end), (row, valid) in itertools.product(steps, enumerate(real)):
            places = [j for j in range(end) if valid[j]]
            made = choose(Step(layer, row, query[row, :, start:end], key[row, :, places]))
            for head, picks in enumerate(made.keys):
                for i in range(end - start):
                    seen = [j for j in picks if places[j] <= start + i]
                    x = torch.stack([made.query[head, i] @ made.key[head // group, j] for j in seen]) * scale
                    picked = value[row, head // group, [places[j] for j in seen]].double()
                    out[row, head, start + i] = (x.softmax(0) @ picked).to(out.dtype)

    with attending(model, change):
        yield
