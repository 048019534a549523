"""Frequencies of rotary tables, found by running what the tables are computed from on positions 0, 1 and 2.

The spelling does not matter: whether positions are multiplied by a buffer, joined by an outer product, or scaled on the
way, the difference of the angles at positions 1 and 0 is the frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.program import Program, place
from tokcompile.rope.ropebounds import EPSILON, halves
from tokcompile.sites.block import Block
from tokcompile.sites.concrete import call
from tokcompile.sites.find import Sites
from tokcompile.sites.order import turned
from tokcompile.sites.rotary import Rotary

aten = torch.ops.aten
Values = Callable[[Node], Tensor | None]
"""Gives the value of a placeholder of a program; None where it is not known."""
_LARGEST = (aten.max.default, aten.amax.default)
_COORDINATES = 4
"""A token has at most so many coordinates: a longer dimension of its positions is another one."""


class Unknown(RuntimeError):
    """A value that is not known outside of a call of the model; says which."""


@dataclass(frozen=True)
class Section:
    """Frequencies that one coordinate of a token turns.

    Attributes:
        coordinate: its number; None where tokens have one position.
        frequencies: in radians a token, those that reach the queries.
    """

    coordinate: int | None
    frequencies: tuple[float, ...]

    @property
    def slowest(self) -> float:
        """The slowest frequency."""
        return min(self.frequencies)


@dataclass(frozen=True, eq=False)
class Curve:
    """One set of angles of a rotary family, and what is needed to run it again.

    Attributes:
        angle: the node whose cosine and sine the tables are.
        blocks: numbers of the live blocks whose queries they turn.
        dtype: the coarsest float format between positions and angles, as `float32`.
        width: rotary dimension: twice the number of frequencies.
        sections: one per coordinate that turns anything.
        why: what hinders the analysis; "" for nothing.
    """

    stack: str
    angle: Node
    blocks: tuple[int, ...]
    dtype: str
    runner: Runner = field(repr=False)
    width: int = 0
    sections: tuple[Section, ...] = ()
    why: str = ""


def find_curves(program: Program, sites: Sites, values: Values, lengths: Mapping[str, float]) -> list[Curve]:
    """The curves of every stack of a program, in graph order.

    Args:
        values: of the program's placeholders: buffers, and inputs as far as they are known.
        lengths: largest position by stack, for frequencies that depend on it.
    """
    found = []
    for name, families in sites.rotary.items():
        for rotary in families:
            for angle in dict.fromkeys(t.args[0] for t in rotary.tables):
                curve = _curve(program, sites, name, rotary, angle, values, lengths.get(name, 1.0))
                found += [curve] if curve.blocks else []
    return found


def _curve(
    program: Program, sites: Sites, stack: str, rotary: Rotary, angle: Node, values: Values, length: float
) -> Curve:
    tables = [t for t in rotary.tables if t.args[0] is angle]
    blocks = sites.stacks[stack].blocks
    reached = [(i, b) for i, b in enumerate(blocks) if b.live and turned(b, set(tables))]
    numbers = tuple(i for i, _ in reached)
    runner = Runner(program, sites, rotary.positions, tables, [b for _, b in reached][:1], values, length)
    dtype = _coarsest(runner.between)
    if not numbers:
        return Curve(stack, angle, (), dtype, runner)
    try:
        width, sections = _sections(runner)
    except RuntimeError as error:  # also what an operator says that cannot be run here
        return Curve(stack, angle, numbers, dtype, runner, why=str(error).splitlines()[0])
    return Curve(stack, angle, numbers, dtype, runner, width, sections)


def _coarsest(nodes: Iterable[Node]) -> str:
    names = [str(n.meta["val"].dtype).removeprefix("torch.") for n in nodes if _is_float(n)]
    return max(names, key=lambda name: EPSILON.get(name, 1.0))


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_floating_point


class Runner:
    """Runs what lies between the positions of a family and the queries of the first block that it turns.

    Attributes:
        between: nodes after the positions, up to the angles.
        coordinate: the dimension of positions that counts coordinates; None for one position a token.
        tokens, angle_tokens: the dimensions of positions, and of angles, that count tokens.
    """

    def __init__(
        self,
        program: Program,
        sites: Sites,
        positions: Node,
        tables: list[Node],
        blocks: list[Block],
        values: Values,
        length: float,
    ) -> None:
        self.positions, self.tables, self.values, self.length = positions, tables, values, length
        self.angle: Node = tables[0].args[0]
        self.reach = sites.reach
        above = self._sorted(self.reach.ancestors([self.angle]))
        self.between = [n for n in above if n is not positions and self.reach.above(positions, n)]
        query = blocks[0].attention.query if blocks else None
        self.shape = [n if isinstance(n, int) else int(n.node.hint) for n in positions.meta["val"].shape]
        self.coordinate = self._coordinate(program, query)
        sizes = [(size, dim) for dim, size in enumerate(self.shape) if dim != self.coordinate]
        self.tokens = max(sizes, default=(1, 0))[1]
        self.angle_tokens = self._followed(program)
        self._query = query

    def _followed(self, program: Program) -> int:
        """The dimension of the angles that counts tokens."""
        dims, goal = program.axes.of(self.angle), program.axes.of(self.positions)[self.tokens]
        return next((number for number, dim in enumerate(dims[:-1]) if dim == goal), len(dims) - 2)

    def _sorted(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.reach.order.__getitem__)

    def _coordinate(self, program: Program, query: Node | None) -> int | None:
        """The dimension of positions that is neither rows nor tokens: time, height and width."""
        if query is None:
            return None
        dims = program.axes.of(query)
        counted = {*dims[0], *dims[-2]}
        for number, dim in enumerate(program.axes.of(self.positions)):
            if 1 < self.shape[number] <= _COORDINATES and not counted & {*dim}:
                return number
        return None

    @property
    def coordinates(self) -> list[int | None]:
        """Numbers of the coordinates; [None] for one position a token."""
        return [None] if self.coordinate is None else list(range(self.shape[self.coordinate]))

    def at(self, position: int, coordinate: int | None) -> Tensor:
        """Positions as the graph has them: all tokens at one place of one coordinate, and at 0 of the others."""
        filled = torch.zeros(self.shape, dtype=self.positions.meta["val"].dtype)
        where = filled if coordinate is None else filled.select(self.coordinate, coordinate)
        where.fill_(position)
        return filled

    def angles(self, positions: Tensor) -> Tensor:
        """Angles at positions, in the dtype of the graph.

        Raises:
            Unknown: something that they depend on is not known here.
        """
        return self._run(self._needed(self.angle), {self.positions: positions})[self.angle]

    def largest(self) -> int:
        """The largest position of the example that was captured.

        Raises:
            Unknown: an input that positions depend on is not known here.
        """
        return int(self._run(self._needed(self.positions), {})[self.positions].max())

    def _needed(self, node: Node) -> list[Node]:
        """A node and its ancestors, without those of the positions alone."""
        keep, todo = set(), [node]
        while todo:
            each = todo.pop()
            if each in keep or (each is self.positions and node is not self.positions):
                continue
            keep.add(each)
            if not self._is_largest(each):
                todo.extend(each.all_input_nodes)
        return self._sorted(keep)

    def _is_largest(self, node: Node) -> bool:
        return node.target in _LARGEST and not _is_float(node) and node is not self.positions

    def used(self, angles: Tensor) -> list[Tensor]:
        """What given angles become where they meet the queries: sines, and cosines, as the first block reads them."""
        values = self._run([n for n in self._after if n is not self.angle], {self.angle: angles})
        return [values[n] for n in self._front]

    @cached_property
    def _after(self) -> list[Node]:
        """What is computed from the angles and constants alone before the queries, changes in place among it."""
        end = self.reach.order[self._query]
        inside = {self.angle}
        for node in self.reach.order:
            inputs = [n for n in node.all_input_nodes if n not in inside]
            if self.reach.order[node] >= end:
                break
            if node.op != "call_function" or len(inputs) == len(node.all_input_nodes):
                continue
            if all(n.op == "call_function" and not n.all_input_nodes for n in inputs):
                inside |= {node, *inputs}
        return self._sorted(inside)

    @cached_property
    def _front(self) -> list[Node]:
        inside = set(self._after)
        return [
            n
            for n in self._after
            if n is not self.angle
            and any(self.reach.above(t, n) for t in self.tables)
            and any(u not in inside and u in self.reach.order and self.reach.above(u, self._query) for u in n.users)
        ]

    @cached_property
    def turning(self) -> list[Node]:
        """Those of the last tables before the queries that are sines."""
        sines = [t for t in self.tables if t.target is aten.sin.default]
        return [n for n in self._front if any(self.reach.above(t, n) for t in sines)]

    def turns(self, angles: Tensor) -> bool:
        """Whether angles turn the queries at all: any sine of them gets there."""
        values = self._run([n for n in self._after if n is not self.angle], {self.angle: angles})
        return any(bool(values[n].any()) for n in self.turning)

    def _run(self, nodes: list[Node], given: Mapping[Node, Tensor]) -> dict[Node, Any]:
        values: dict[Node, Any] = {node: value.clone() for node, value in given.items()}
        for node in nodes:
            if node not in values:
                values[node] = self._value(node, values)
        return values

    def _value(self, node: Node, values: Mapping[Node, Any]) -> Any:
        if self._is_largest(node):
            # A graph that asks for the largest position has tables that depend on the length.
            return torch.tensor(max(int(self.length) - 1, 0), dtype=node.meta["val"].dtype)
        if node.op == "call_function":
            return call(node, values)
        if node.op == "get_attr":
            return getattr(node.graph.owning_module, node.target).detach().clone()
        fake = node.meta["val"]
        if not isinstance(fake, Tensor):
            return fake if isinstance(fake, (int, float)) else fake.node.hint
        known = self.values(node)
        if known is None:
            raise Unknown(f"the angles depend on a value that is not known outside of a call: {place(node)}")
        return known.detach().cpu().clone()  # a graph may change it in place


def _sections(runner: Runner) -> tuple[int, tuple[Section, ...]]:
    """Rotary dimension, and the frequencies of each coordinate."""
    start = runner.angles(runner.at(0, None)).double()
    steps: dict[int | None, Tensor] = {}
    for coordinate in runner.coordinates:
        one, two = (runner.angles(runner.at(p, coordinate)).double() - start for p in (1, 2))
        if not torch.allclose(two, 2 * one, rtol=1e-2, atol=1e-6):
            raise Unknown("the angles are no multiples of the positions, as where these pick rows of a table")
        steps[coordinate] = one.abs()
    whole = sum(_by_column(step) for step in steps.values())
    sections = [Section(c, found) for c, step in steps.items() if (found := _reaching(runner, step))]
    if not sections:
        raise Unknown("the angles do not depend on the positions")
    return 2 * halves(whole.tolist()), tuple(sections)


def _by_column(step: Tensor) -> Tensor:
    return step.reshape(-1, step.shape[-1]).amax(0)


def _reaching(runner: Runner, step: Tensor) -> tuple[float, ...]:
    """Frequencies that reach the queries, fastest first, each once: tables may be cut or put together of several."""
    found = []
    for number, frequency in enumerate(_by_column(step).tolist()):
        if not frequency:
            continue
        lone = torch.zeros(step.shape, dtype=runner.angle.meta["val"].dtype)
        lone[..., number] = (step[..., number] != 0).to(lone.dtype)
        if not runner.turning or runner.turns(lone):
            found.append(frequency)
    return tuple(sorted(set(found), reverse=True))
