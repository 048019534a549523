"""Small captured graphs: a function traced to the dialect that models are captured in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tokcompile.program import Program


def traced(function: Callable[..., Any], *inputs: Tensor, dynamic: Sequence[Sequence[int]] = ()) -> Program:
    """Trace a function; `dynamic` lists for each input the dimensions whose size is a symbol."""
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = [_fake(mode, value, dynamic[i] if i < len(dynamic) else ()) for i, value in enumerate(inputs)]
    with mode:
        gm = make_fx(function, pre_dispatch=True)(*fakes)
    program = Program(gm, mode)
    for node, fake in zip([n for n in gm.graph.nodes if n.op == "placeholder"], fakes, strict=True):
        node.meta.setdefault("val", fake)
        program.kinds[node] = "input"
    return program


def _fake(mode: FakeTensorMode, value: Tensor, dynamic: Sequence[int]) -> Tensor:
    if not dynamic:
        return mode.from_tensor(value)
    kinds = [DimDynamic.DYNAMIC if i in dynamic else DimDynamic.STATIC for i in range(value.ndim)]
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(kinds))


def results(program: Program) -> list[Node]:
    """The values that a program returns."""
    returned = program.output.args[0]
    return list(returned) if isinstance(returned, (tuple, list)) else [returned]


def calls(program: Program, target: Any) -> list[Node]:
    """The calls of one operator, in graph order."""
    return [n for n in program.graph.nodes if n.target is target]
