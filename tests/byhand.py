"""Any model run by hand on a reduced sequence: hooks that shorten what its blocks are given, and nothing else.

A hook before each block from the cut on gathers every tensor argument (hidden states, masks by rows and columns, rotary
tables, positions) along each dimension as long as the sequence. That is a guess by size, which a compiler must not
make; here the lengths of the examples are chosen so that it cannot be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

Kept = list[list[int]]
"""For each batch row the indices of the tokens that stay, ascending."""
METHODS = ("_get_rel_pos_bias",)
"""Methods of modules that make a table for all places of their own accord."""
ROTARY = "rope"
"""The argument of blocks whose table leaves out the tokens in front that are not turned."""


@dataclass(frozen=True)
class Cut:
    """Tokens taken away before a block and for all that follow.

    Attributes:
        blocks: all blocks of the stack.
        first: the block before which tokens go.
        kept: what stays of `length` tokens.
        readers: blocks of another stack that read this sequence, as a decoder reads an encoder's.
        rotary: modules that make rotary tables from positions, which are then numbered anew; none to keep positions.
    """

    blocks: Sequence[nn.Module]
    first: int
    kept: Kept
    length: int
    readers: Sequence[nn.Module] = ()
    rotary: Sequence[nn.Module] = ()


def take(value: Tensor, kept: Kept, length: int) -> Tensor:
    """Gather every dimension of a size, row by row; a value without a batch dimension gets one."""
    dims = [i for i, size in enumerate(value.shape) if size == length]
    if not dims:
        return value
    flat = dims[0] == 0
    rows = []
    for number, row in enumerate(kept):
        one = value if flat else value[number if value.shape[0] == len(kept) else 0]
        for dim in dims:
            one = one.index_select(dim - (not flat), torch.tensor(row))
        rows.append(one)
    return torch.stack(rows)


@contextmanager
def applied(cuts: Sequence[Cut]) -> Iterator[None]:
    """Run models under cuts; several cuts of one stack are made one after the other."""
    with ExitStack() as stack:
        for cut in cuts:
            following = list(cut.blocks)[cut.first :]
            for module in cut.rotary:
                stack.callback(module.register_forward_pre_hook(_renumbered(cut), with_kwargs=True).remove)
            for block in [*following, *cut.readers]:
                stack.callback(block.register_forward_pre_hook(_shortener(cut), with_kwargs=True).remove)
            for module in (m for block in following for m in block.modules()):
                if "bias" in type(module).__name__.lower():  # it makes a table for all places of its own accord
                    stack.callback(module.register_forward_hook(_shortened(cut)).remove)
                for name in METHODS:
                    if hasattr(module, name):
                        stack.callback(_wrapped(module, name, cut))
        yield


def _renumbered(cut: Cut) -> Any:
    """Positions [B or 1, T] less the number of tokens dropped before each; nobody reads those of tokens that go."""
    gone = torch.ones(len(cut.kept), cut.length, dtype=torch.long)
    for row, kept in zip(gone, cut.kept, strict=True):
        row[kept] = 0

    def renumber(module: nn.Module, args: Any, kwargs: Any) -> Any:
        del module
        return tree_map_only(Tensor, lambda v: v if v.is_floating_point() else v - gone.cumsum(1), (args, kwargs))

    return renumber


def _wrapped(module: nn.Module, name: str, cut: Cut) -> Callable[[], None]:
    """Let a method of one module return what is left; returns what undoes it."""
    method = getattr(module, name)
    setattr(module, name, lambda: take(method(), cut.kept, cut.length))
    return lambda: delattr(module, name)


def _shortener(cut: Cut) -> Any:
    def shorten(module: nn.Module, args: Any, kwargs: Any) -> Any:
        del module
        turns = {ROTARY: turned(kwargs[ROTARY], cut.kept, cut.length)} if kwargs.get(ROTARY) is not None else {}
        rest = {name: value for name, value in kwargs.items() if name not in turns}
        args, rest = tree_map_only(Tensor, lambda v: take(v, cut.kept, cut.length), (args, rest))
        return args, rest | turns

    return shorten


def turned(table: Tensor, kept: Kept, length: int) -> Tensor:
    """A rotary table [N, D] as [B, 1, N', D], for all heads; it leaves out tokens in front that are not turned."""
    front = length - len(table)
    return torch.stack([table[[i - front for i in row if i >= front]] for row in kept]).unsqueeze(1)


def _shortened(cut: Cut) -> Any:
    return lambda module, args, out: tree_map_only(Tensor, lambda v: take(v, cut.kept, cut.length), out)


def without(inputs: dict[str, Tensor], kept: Kept, length: int) -> dict[str, Tensor]:
    """Inputs whose token sequence holds the kept tokens alone."""
    return {
        n: take(v, kept, length) if v.ndim in (2, 3) and length in v.shape[1:] and not v.is_floating_point() else v
        for n, v in inputs.items()
    }


def block_list(root: nn.Module, *paths: str) -> nn.ModuleList:
    """The largest list of modules below a module (below its first path that exists)."""
    for path in paths:
        try:
            root = root.get_submodule(path)
            break
        except AttributeError:
            continue
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
