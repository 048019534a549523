"""Launch the Triton kernel of an operator in tests, with its results poisoned before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from tokcompile import kernels
from tokcompile.kernels import _library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels run: on a CPU under Triton's interpreter."""
POISON = {torch.bool: True}
"""What an element holds that no kernel wrote: NaN, the largest integer, or this."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` makes."""
    empty = torch.empty

    def filled(*args: Any, **kwargs: Any) -> Tensor:
        made = empty(*args, **kwargs)
        if made.dtype in POISON:
            return made.fill_(POISON[made.dtype])
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).max)

    with mock.patch.object(torch, "empty", filled):
        yield


def launched(name: str, *args: Any) -> Any:
    """The kernel's results on the CPU, which must be contiguous; arguments must be as they were after it."""
    args = tuple(tree_map(lambda leaf: leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf, list(args)))
    assert kernels.kernel_fault(name, args) is None
    before = [leaf.clone() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    with poisoned():
        made = _library._part(name).launch(*args)
    assert all(each.is_contiguous() for each in tree_leaves(made))
    same = zip(before, (leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), strict=True)
    assert all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in same)
    return tree_map(Tensor.cpu, made)


def strided(value: Tensor, kind: int) -> Tensor:
    """The same value: as it is, with its last two dimensions swapped in memory, or with every other element unused."""
    if kind == 1 and value.dim() > 1:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == 2 and value.dim():
        return torch.stack([value, value.flip(-1)], -1)[..., 0]
    return value


def launched_by_name(name: str, **given: Any) -> Any:
    """`launched` with arguments by the names of the operator's schema."""
    schema = getattr(torch.ops.tokred, name).default._schema
    return launched(name, *(given[argument.name] for argument in schema.arguments))
