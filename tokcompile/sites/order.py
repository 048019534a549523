"""How a stack knows the order of its tokens: rotary tables, a bias of its attention, or positions in its embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.program import Program
from tokcompile.sites.block import Block, Stack
from tokcompile.sites.concrete import evaluate
from tokcompile.sites.find import Sites
from tokcompile.sites.sight import rows_of_integers

aten = torch.ops.aten
_ADDS = {aten.add.Tensor, aten.add_.Tensor}
_LOOKUPS = {aten.embedding.default, aten.index.Tensor}
_THROUGH = {
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.to.dtype,
    aten.to.device,
    aten.clone.default,
    aten.mul.Tensor,
    aten.dropout.default,
}


@dataclass(frozen=True)
class Order:
    """One way in which tokens get their order.

    Attributes:
        kind: `rotary`; `bias`, added to the scores; `learned`, a trained table added to the embeddings; `fixed`, such a
            table that was not trained.
        blocks: those that it reaches, by number.
        shape: of the integer positions of rotary tables; None for the others.
    """

    kind: str
    blocks: tuple[int, ...]
    shape: tuple[int, ...] | None = None


def find_order(program: Program, sites: Sites, name: str) -> list[Order]:
    """How the stack of a name knows the order of its tokens; nothing for one that does not."""
    stack = sites.stacks[name]
    every = tuple(range(len(stack.blocks)))
    found = []
    for rotary in sites.rotary.get(name, []):
        blocks = tuple(i for i in every if turned(stack.blocks[i], set(rotary.tables)))
        found.append(Order("rotary", blocks, tuple(rotary.positions.meta["val"].shape)))
    biased = tuple(i for i in every if _biased(program, sites, stack.blocks[i]))
    if biased:
        found.append(Order("bias", biased))
    tables = {kind for node in _before(sites, stack) for kind in _added(program, sites, node)}
    return found + [Order(kind, every) for kind in sorted(tables)]


def turned(block: Block, tables: set[Node]) -> bool:
    """Whether rotary tables reach the queries of a block other than by its input."""
    todo, seen = [block.attention.query], {block.input}
    while todo:
        node = todo.pop()
        if node in tables:
            return True
        if node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return False


def _biased(program: Program, sites: Sites, block: Block) -> bool:
    """Whether a mask adds numbers of its own to the scores: one for each head, or learned ones."""
    mask = block.attention.mask
    value = mask.meta["val"] if mask is not None else None
    if value is None or not value.dtype.is_floating_point:
        return False
    by_head = value.ndim > 2 and value.shape[-3] != 1
    return by_head or sites.reach.any_above(mask, program.inputs("parameter"))


def _before(sites: Sites, stack: Stack) -> Iterator[Node]:
    """What makes the embeddings of a stack: of the first one, where several follow each other; not the images'."""
    reach, start = sites.reach, stack.blocks[0].input
    features = sites.splice.features if sites.splice is not None else None
    spliced = features is not None and reach.above(features, start)
    for other in sites.stacks.values():
        first = other.blocks[0].input
        if reach.above(first, start) and not (spliced and reach.above(first, features)):
            start = first
            break
    without = reach.ancestors([features]) if spliced else set()
    yield from reach.ancestors([start]) - without


def _added(program: Program, sites: Sites, node: Node) -> Iterator[str]:
    """The kinds of tables that an addition brings to embeddings: they have a row for each token."""
    if node.target not in _ADDS or not all(isinstance(a, Node) for a in node.args[:2]):
        return
    inputs, weights = program.inputs(), program.inputs("parameter")
    for own, other in (node.args[:2], node.args[1::-1]):
        value = own.meta["val"]
        if value.ndim < 2 or value.shape[-2] == 1 or not value.dtype.is_floating_point:
            continue
        if sites.reach.any_above(other, inputs) and _is_table(program, sites, own):
            trained = any(n.meta.get("trained") and sites.reach.above(n, own) for n in weights)
            yield "learned" if trained else "fixed"


def _is_table(program: Program, sites: Sites, node: Node) -> bool:
    inputs = program.inputs()
    while node.target in _THROUGH and isinstance(node.args[0], Node):
        node = node.args[0]
    if node.target in _LOOKUPS and not sites.reach.any_above(node.args[0], inputs):
        table, indices = node.args[:2]
        indices = indices if isinstance(indices, Node) else next(i for i in indices if i is not None)
        return _counts(program, sites, table, indices)
    return not sites.reach.any_above(node, inputs)


def _counts(program: Program, sites: Sites, table: Node, indices: Node) -> bool:
    """Whether numbers count places: they differ from token to token even where all tokens are the same.

    Those that a model keeps ready, or that cannot be computed here, count where the table has as many rows as there are
    tokens, which tables of kinds of tokens have not.
    """
    found = [n for n in sites.reach.ancestors([indices]) if n.op == "placeholder" and rows_of_integers(n)]
    values = [evaluate(indices, sites.reach, zeros={zero}) for zero in (None, *found)]
    known = [value for value in values if value is not None and value.ndim]
    kept_ready = not sites.reach.any_above(indices, program.inputs()) and sites.reach.any_above(indices, found)
    if kept_ready or not known:
        return table.meta["val"].shape[0] >= indices.meta["val"].shape[-1]
    return any(bool((value != value[..., :1]).any()) for value in known)
