"""What must hold of a rewritten graph."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Interpreter, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.errors import EditError
from tokcompile.program import Program, place


class _Shapes(Interpreter):
    """Run the graph on fake values and compare each with what the edit left in `meta["val"]`.

    Layers repeat each other: an operator that has run on arguments of the same shapes is not run again, which would be
    most of the time of a deep model.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.gm)
        self._known: dict[Any, torch.Tensor] = {}
        self._repeats = not any(_changes_views(n) for n in program.graph.nodes)

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr":
            return n.meta["val"]
        key = self._signature(n)
        result = self._known.get(key) if key is not None else None
        if result is None:
            result = self._run(n)
            if key is not None and isinstance(result, torch.Tensor) and _described(result) is not None:
                self._known[key] = result
        expected = n.meta.get("val")
        if isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor):
            _compare(n, result, expected)
        return result

    def _signature(self, n: Node) -> Any:
        """What the shape of a result follows from; None where sizes are symbolic or not all of it is known."""
        if not self._repeats or n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        described = _described((args, tuple(sorted(kwargs.items()))))
        return None if described is None else (n.target, described)

    def _run(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except EditError:
            raise
        except Exception as error:
            raise EditError("the rewritten graph does not run", where=[place(n)], found=str(error)) from error


def _changes_views(node: Node) -> bool:
    """Whether an operator changes the shape of its argument in place: results are shared between nodes here."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.inplace_view in node.target.tags


def _described(value: Any) -> Any:
    """An argument as something to compare: tensors by their layout; None where a size is symbolic."""
    if isinstance(value, torch.Tensor):
        shape, stride = tuple(value.shape), value.stride()
        if not all(type(n) is int for n in (*shape, *stride)):
            return None
        return shape, stride, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        parts = tuple(map(_described, value))
        return None if None in parts else (type(value), parts)
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return None
    return type(value), value


def _compare(node: Node, result: torch.Tensor, expected: torch.Tensor) -> None:
    alike = len(result.shape) == len(expected.shape) and all(
        same(size_of(a), size_of(b)) or _anew(a, b) for a, b in zip(result.shape, expected.shape, strict=True)
    )
    if not alike or result.dtype != expected.dtype:
        raise EditError(
            "the rewritten graph has another shape than the edit says",
            where=[place(node)],
            found=f"{tuple(result.shape)} {result.dtype}, not {tuple(expected.shape)} {expected.dtype}",
        )


def _anew(one: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    """Whether two sizes depend on the values of an input: each walk gives such a size a new symbol."""
    return all(isinstance(s, torch.SymInt) and free_unbacked_symbols(s) for s in (one, other))


def verify(program: Program) -> None:
    """Check a program: the graph is well formed, and shape propagation gives every value the shape it claims.

    Raises:
        EditError: naming the first node that fails.
    """
    program.graph.lint()
    fakes = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    symbols = program.fake_mode.shape_env
    # A scalar that the model reads gets a new symbol each time the graph is walked: none of this walk's is kept.
    fresh = symbols.ignore_fresh_unbacked_symbols() if symbols is not None else nullcontext()
    with program.fake_mode, enable_python_dispatcher(), torch.no_grad(), fresh:
        _Shapes(program).run(*fakes)
