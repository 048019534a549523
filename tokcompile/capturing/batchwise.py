"""Export of models that take a batch apart row by row and put it together at once.

LLaVA makes a list of the features of its images and concatenates it. A loop over rows fixes their number in a graph;
what comes out of this one is the same tensor with two dimensions as one, for any number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokcompile.errors import CaptureError


class Rows:
    """All rows of a tensor in place of each: it knows to be concatenated, and refuses anything else."""

    def __init__(self, whole: Tensor) -> None:
        self.whole = whole

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Concatenate; see torch's documentation on overriding functions."""
        given = dict(zip(("tensors", "dim"), args, strict=False)) | dict(kwargs or {})
        pieces = given.get("tensors")
        if function is torch.cat and given.get("dim", 0) == 0 and isinstance(pieces, list | tuple) and len(pieces) == 1:
            return pieces[0].whole.flatten(0, 1)
        raise _refused(getattr(function, "__name__", str(function)))

    def __getattr__(self, name: str) -> Any:
        raise _refused(name)


def _refuse(name: str) -> Callable[..., Any]:
    def refuse(self: Rows, *args: Any) -> Any:
        raise _refused(name)

    return refuse


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "matmul",
    "neg",
    "getitem",
    "len",
    "iter",
    "bool",
):
    setattr(Rows, f"__{_name}__", _refuse(_name))  # Python asks the class for these, not __getattr__


def _refused(what: str) -> CaptureError:
    return CaptureError(
        "the model goes through rows one by one, whose number is to be dynamic",
        found=f"'{what}' of a single row",
        remedy="export with a fixed number of rows: name no dimension of the batch in dynamic shapes",
    )


@contextmanager
def whole_batches() -> Iterator[None]:
    """While this lasts, tensors with a symbolic number of rows yield all of them as one `Rows`."""
    rows, length = Tensor.__iter__, Tensor.__len__

    def iterate(self: Tensor) -> Iterator[Any]:
        return iter((Rows(self),)) if _open(self) else rows(self)

    def count(self: Tensor) -> int:
        if _open(self):
            raise TypeError("the number of rows is symbolic")  # list() asks, and goes on without an answer
        return length(self)

    Tensor.__iter__, Tensor.__len__ = iterate, count  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__iter__, Tensor.__len__ = rows, length  # type: ignore[method-assign]


def _open(x: Tensor) -> bool:
    """Whether a tensor has rows of several values, and nobody knows how many."""
    return x.dim() > 1 and isinstance(x.shape[0], torch.SymInt) and x.shape[0].node.expr.free_symbols != set()
