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
    """Run the graph on fake values and compare each with what the edit left in `meta["val"]`."""

    def run_node(self, n: Node) -> Any:
        if n.op == "get_attr":
            return n.meta["val"]
        try:
            result = super().run_node(n)
        except EditError:
            raise
        except Exception as error:
            raise EditError("the rewritten graph does not run", where=[place(n)], found=str(error)) from error
        expected = n.meta.get("val")
        if isinstance(result, torch.Tensor) and isinstance(expected, torch.Tensor):
            _compare(n, result, expected)
        return result


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
        _Shapes(program.gm).run(*fakes)
