"""How each block's queries or keys are turned: its rotary tables, and which numbers of a head are pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.program import Program, place
from tokcompile.sites.attention import Attention
from tokcompile.sites.block import Block
from tokcompile.sites.find import Sites
from tokcompile.sites.turns import Turn, find_turns, heads_of

aten = torch.ops.aten
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
_WAVES = {aten.cos.default, aten.sin.default, aten.polar.default}


@dataclass(frozen=True, eq=False)
class Rotation:
    """What turns the queries, or the keys, of one block.

    Attributes:
        cos, sin: the tables, [B or 1, H or 1, T, W], [B or 1, T, H or 1, W], [1, T, W] or [T, W].
        heads: the dimension of a table of four that counts heads.
        apart: whether a column stands for both numbers of its pair: pairs have one column each.
        neighbours: whether the numbers of a pair stand side by side, and not half a turned part from each other.
        lead: how many numbers of a head stand before the part that is turned; None where that is not known.
    """

    cos: Node
    sin: Node
    heads: int
    apart: bool
    neighbours: bool
    lead: int | None


def find_rotations(program: Program, sites: Sites, stack: str, of: str = "query") -> dict[Attention, Rotation]:
    """The rotations of a stack, by the attention whose queries they turn; blocks without any are left out.

    Args:
        of: `query`, or `key` for what turns keys.

    Raises:
        EditError: they are turned in a way that is not known.
    """
    turns = [turn for each in find_turns(program, sites, stack) for turn in each.turns]
    found = {}
    for block in sites.stacks[stack].blocks:
        turned, reach = getattr(block.attention, of), sites.reach
        own = [t for t in turns if reach.above(t.node, turned) and reach.above(block.input, t.value)]
        if own:
            found[block.attention] = _rotation(own, block)
        else:
            _check_none(block, sites, turned)
    return found


def _rotation(turns: list[Turn], block: Block) -> Rotation:
    """The rotation that some products make, all by the same columns of cosines and of sines."""
    columns = {(turn.coordinates, turn.pairs) for turn in turns}
    waves = {turn.wave: turn for turn in reversed(turns)}
    pairs = next(iter(columns))[1]
    half = len(pairs) // 2
    twice, each = pairs[:half] == pairs[half:], pairs[::2] == pairs[1::2]
    apart = len(set(pairs)) == len(pairs)
    if len(columns) > 1 or set(waves) != {"cos", "sin"} or not (apart or twice or each):
        raise EditError(
            "queries or keys of a block are turned by several tables, or by columns in an order that is not known",
            where=[place(block.attention.node)],
            found=f"columns of frequencies {sorted(pairs for _, pairs in columns)}",
            remedy="use it on a model whose queries are turned half by half or pair by pair, by one table",
        )
    cos, sin = waves["cos"], waves["sin"]
    neighbours = _alternate(cos.value) if apart else not twice
    lead = _lead(cos.value, len(pairs) * (1 + apart), block.attention.query.meta["val"].shape[-1])
    return Rotation(cos.table, sin.table, heads_of(cos), apart, neighbours, lead)


def _lead(value: Node, width: int, head: int) -> int | None:
    """How many of the `head` numbers of a head stand before the `width` that are turned, of which a value is a part."""
    if width == head:
        return 0
    part = value
    while value.meta["val"].shape[-1] < head and value.op == "call_function":
        part = value
        value = value.args[0].args[0] if value.args[0].target in _SPLITS else value.args[0]
    if value.meta["val"].shape[-1] != head:
        return None
    if part.target is aten.slice.Tensor:
        return part.args[2] if len(part.args) > 2 and part.args[2] is not None else 0
    return 0 if part.args[1:] == (0,) else None


def _alternate(part: Node) -> bool:
    """Whether one half of the numbers to be turned was taken out as every second one."""
    if part.target is aten.slice.Tensor:
        return len(part.args) > 4 and part.args[4] == 2
    if part.target is aten.select.int:
        return True
    return part.op == "call_function" and part.args[0].target is aten.unbind.int


def _check_none(block: Block, sites: Sites, turned: Node) -> None:
    """Refuse queries or keys that something turns which is made in this block, or for it."""
    reach = sites.reach
    for node in reach.order:
        if node.target in _WAVES and reach.above(node, turned) and not reach.above(node, block.input):
            raise EditError(
                "queries or keys of a block are turned by tables that are not known",
                where=[place(node)],
                found="angles that are no products of positions and frequencies, as those that follow the content are",
                remedy="use it on a model whose rotary tables are computed from positions, or which has none",
            )
