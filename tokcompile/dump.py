"""`TOKRED_DUMP=dir`: the graph after each stage as readable text."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import torch
from torch.fx import Node

from tokcompile.program import Program, module_path

_count = itertools.count()


def dump(program: Program, stage: str) -> None:
    """Write the graph to `$TOKRED_DUMP/NNN-stage.txt`; nothing without the variable."""
    folder = os.environ.get("TOKRED_DUMP")
    if not folder:
        return
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{next(_count):03}-{stage}.txt").write_text(as_text(program.graph.nodes))


def as_text(nodes: object, *, modules: bool = True) -> str:
    """One line per node: result, operator, arguments, shape, and the module it came from."""
    return "".join(_line(node, modules) + "\n" for node in nodes)


def _line(node: Node, modules: bool) -> str:
    value = node.meta.get("val")
    shape = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    if node.op == "placeholder":
        return f"{node.name}: {shape or value} = input"
    if node.op == "output":
        return f"return {node.args[0]}"
    target = str(node.target)
    arguments = ", ".join([*map(str, node.args), *(f"{k}={v}" for k, v in node.kwargs.items())])
    mark = f"  # {node.meta['custom']['tokred']}" if "tokred" in node.meta.get("custom", {}) else ""
    where = module_path(node) if modules else ""
    return f"{node.name}: {shape} = {target}({arguments}){mark or (f'  # {where}' if where else '')}"
