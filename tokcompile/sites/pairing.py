"""Which numbers of a block's queries and keys are turned by its rotation, pair by pair, as its attention reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.program import Program, place
from tokcompile.sites.attention import Attention
from tokcompile.sites.block import Block
from tokcompile.sites.find import Sites
from tokcompile.sites.rotation import find_rotations
from tokcompile.sites.turns import Frequencies, Turn, find_turns

aten = torch.ops.aten
_THROUGH = {
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.transpose.int,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_JOINS = {aten.cat.default, aten.stack.default}


@dataclass(frozen=True, eq=False)
class Pairing:
    """How the rotation of one block pairs the numbers of a head.

    Attributes:
        frequencies: what its angles are made of.
        numbers: for each pair the number of its frequency.
        coordinates: for each pair which position of a token turns it: 0, but for tokens of several positions.
        start: where in a head the pairs begin; numbers before and behind them are not turned.
        neighbours: whether a pair is two numbers side by side, and not half of the turned part from each other.
    """

    frequencies: Frequencies
    numbers: tuple[int, ...]
    coordinates: tuple[int, ...]
    start: int
    neighbours: bool

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.numbers)


def find_pairings(program: Program, sites: Sites, stack: str) -> dict[Attention, Pairing]:
    """The pairings of a stack, by the attention; blocks whose queries nothing turns are left out.

    Raises:
        EditError: queries or keys are turned, or put together after it, in a way that is not known.
    """
    rotations = find_rotations(program, sites, stack)
    turns = [(each, turn) for each in find_turns(program, sites, stack) for turn in each.turns]
    found = {}
    for block in sites.stacks[stack].blocks:
        site, reach = block.attention, sites.reach
        if site not in rotations:
            continue
        own = [(f, t) for f, t in turns if reach.above(t.node, site.query) and reach.above(block.input, t.value)]
        frequencies = {id(f): f for f, _ in own}
        if len(frequencies) != 1:
            raise _unknown(block, f"angles of {len(frequencies)} kinds")
        found[site] = _pairing(block, sites, next(iter(frequencies.values())), [t for _, t in own])
    return found


def _pairing(block: Block, sites: Sites, frequencies: Frequencies, turns: list[Turn]) -> Pairing:
    columns, own = turns[0].pairs, turns[0].coordinates
    half = len(columns) // 2
    apart = len(set(columns)) == len(columns)
    neighbours = not apart and columns[::2] == columns[1::2] and columns[:half] != columns[half:]
    numbers, own = ((c if apart else c[::2] if neighbours else c[:half]) for c in (columns, own))
    site, cache = block.attention, sites.caches.get(block)
    turned = {turn.node for turn in frequencies.turns if sites.reach.above(block.input, turn.value)}
    key = site.key if cache is None else cache.key
    ends = [site.query, key.args[0][1] if key.target is aten.cat.default and cache and cache.past is not None else key]
    layouts = {_layout(end, block, sites, turned) for end in ends}
    if len(layouts) != 1:
        raise _unknown(block, "queries and keys that are put together in different ways")
    start, joined = layouts.pop()
    if apart:
        neighbours = joined == "stack"
        if joined == "sum":
            raise _unknown(block, "halves of pairs that are not joined again")
    elif joined == "stack" or (joined == "cat" and neighbours):
        raise _unknown(block, "pairs that are put in another order after they were turned")
    return Pairing(frequencies, tuple(numbers), tuple(own), start, neighbours)


def _layout(end: Node, block: Block, sites: Sites, turned: set[Node]) -> tuple[int, str]:
    """Where the turned numbers begin in what attention reads, and how they were joined: `sum`, `cat` or `stack`."""
    node, start, reach = end, 0, sites.reach
    while True:
        if node.target in _SUMS:
            return start, "sum"
        if node.target in _JOINS:
            parts = list(node.args[0])
            with_turns = [part for part in parts if any(reach.above(each, part) for each in turned)]
            if len(with_turns) == len(parts):
                return start, "stack" if node.target is aten.stack.default else "cat"
            dim = node.args[1] if len(node.args) > 1 else 0
            if len(with_turns) != 1 or dim % node.meta["val"].ndim != node.meta["val"].ndim - 1:
                raise _unknown(block, f"a join of {len(with_turns)} turned parts in '{node.name}'")
            start += sum(part.meta["val"].shape[-1] for part in parts[: parts.index(with_turns[0])])
            node = with_turns[0]
        elif node.target in _THROUGH or (node.target is aten.mul.Tensor and not isinstance(node.args[1], Node)):
            node = node.args[0]
        elif node.target is aten.expand.default or node.target is aten.unsqueeze.default:
            node = node.args[0]
        else:
            raise _unknown(block, f"'{node.name}' ({node.target}) between the rotation and the attention")


def _unknown(block: Block, found: str) -> EditError:
    return EditError(
        "which numbers of queries and keys are pairs is not known",
        where=[place(block.attention.node)],
        found=found,
        remedy="use it on a model that attends to queries and keys as its rotation leaves them",
    )
