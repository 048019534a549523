"""Give a rewritten graph to a target's compiler.

The `tokred::` operators carry their references as composite implementations: AOTAutograd, and so Inductor, sees the
ATen operators that they are made of and fuses across them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from tokcompile.errors import LowerError, known


def _inductor(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(gm, list(example_inputs))


def _aot_eager(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    return aot_eager(gm, list(example_inputs))


def _eager(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    del example_inputs
    return gm.forward


TARGETS: dict[str, Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]] = {
    "inductor": _inductor, "aot_eager": _aot_eager, "eager": _eager,
}


def lower(gm: GraphModule, example_inputs: Sequence[Any], target: str) -> Callable[..., Any]:
    """Compile a rewritten graph.

    Args:
        gm: the rewritten graph module.
        example_inputs: what Dynamo handed over beside the graph.
        target: `inductor`, `aot_eager` or `eager`.

    Raises:
        LowerError: the target is not known.
    """
    if target not in TARGETS:
        raise LowerError(f"unknown target '{target}'", remedy=known(target, TARGETS))
    return TARGETS[target](gm, example_inputs)
