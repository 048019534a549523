"""What says where a token stands beside rotary tables: rows of a learned table, and biases by distance.

Models that are not told positions count them from the length of their cache, which says no more where a token stands
once keys are gone.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.program import SIZES, Program
from tokcompile.sites import Attention, Sites
from tokcompile.sites.concrete import evaluate

aten = torch.ops.aten
_ROWS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.slice.Tensor}


def counted_rows(program: Program, sites: Sites) -> Node | None:
    """Where a step adds rows of a learned table that its cache's length picks, and no input; None where it does not."""
    stream = sites.stacks["decoder"].blocks[0].input
    weights = set(program.inputs("parameter"))
    inputs = {n for n in program.inputs() if not n.meta["val"].dtype.is_floating_point}
    for node in sites.reach.ancestors([stream]):
        if node.target in _ROWS and node.args[0] in weights and not _told(node, inputs):
            return node
    # A table's rows from the cache's length on, picked by a mask of all tokens, are more than the tokens of this step.
    tokens = sites.embedding
    several = tokens is not None and not same(_tokens(tokens), _tokens(stream))
    return stream if several else None


def _told(node: Node, inputs: set[Node]) -> bool:
    """Whether a value depends on what one of some inputs holds, not on how large it is alone."""
    todo, seen = [node], set[Node]()
    while todo:
        each = todo.pop()
        if each in inputs:
            return True
        if each not in seen and each.target not in SIZES:
            todo.extend(each.all_input_nodes)
        seen.add(each)
    return False


def _tokens(node: Node) -> object:
    return size_of(node.meta["val"].shape[1])


def is_biased(program: Program, sites: Sites, site: Attention) -> bool:
    """Whether an attention adds more to its scores than what hides keys: a bias, learned or by distance."""
    if site.mask is None or site.mask.meta["val"].dtype == torch.bool:
        return False
    if _learned(program, site.mask):
        return True
    values = evaluate(site.mask, sites.reach)
    return values is not None and bool(((values != 0) & (values > torch.finfo(values.dtype).min / 2)).any())


def _learned(program: Program, mask: Node) -> bool:
    """Whether a mask holds numbers of a parameter, and not what those of the text's places say alone."""
    weights = {n for n in program.inputs("parameter") if n.meta["val"].ndim > 1}
    todo, seen = [mask], set[Node]()
    while todo:
        node = todo.pop()
        value = node.meta.get("val")
        if node in seen or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
            continue
        if node in weights:
            return True
        seen.add(node)
        todo.extend(node.all_input_nodes)
    return False
