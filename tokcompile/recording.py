"""Selections recorded from one run and given back as constants: the ideal that a compiled rule is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.program import Program

aten = torch.ops.aten


class Recording:
    """Token maps of the last run, by name (`rule/0`, `rule/1`…): int64 [B, T'], the old token for each new one.

    Give one as `options={"record": recording}` to fill it, as `options={"replay": recording}` to compile the same
    rewritten graph with its selections constant, so that scoring and selecting cost nothing.
    """

    def __init__(self) -> None:
        self.maps: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"Recording({ {name: tuple(t.shape) for name, t in self.maps.items()} })"


def token_maps(program: Program) -> dict[str, Node]:
    """The token maps of a rewritten program, by name, in graph order."""
    return {n.meta["token_map"]: n for n in program.graph.nodes if "token_map" in n.meta}


def record(program: Program, recording: Recording) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let the graph also return its token maps, and return what turns the compiled graph back into the model's."""
    maps = token_maps(program)
    output = program.output
    own = list(output.args[0])
    output.args = ((*own, *maps.values()),)
    program.gm.recompile()

    def wrap(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Sequence[Any]:
            results = list(compiled(*args))
            recording.maps.update(zip(maps, (r.detach().clone() for r in results[len(own) :]), strict=True))
            return tuple(results[: len(own)])

        return run

    return wrap


def replay(program: Program, recording: Recording) -> None:
    """Replace the token maps of a program by recorded ones.

    Raises:
        EditError: a map was not recorded, or has another shape.
    """
    for name, node in token_maps(program).items():
        held = recording.maps.get(name)
        if held is None or not _fits(held.shape, node.meta["val"].shape):
            raise EditError(
                f"no recorded selection fits '{name}'",
                found=str(recording),
                remedy="record with the same rule, options and input shapes",
            )
        attribute = f"_replayed_{len(program.gm._buffers)}"
        program.gm.register_buffer(attribute, held)
        with program.graph.inserting_before(node):
            constant = program.graph.get_attr(attribute)
        constant.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(constant)
    for node in reversed(list(program.graph.nodes)):
        if node.target is aten._assert_async.msg and "tokred" in node.meta.get("custom", {}):
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.changed()
    program.gm.recompile()


def _fits(held: Sequence[int], wanted: Sequence[Any]) -> bool:
    """Whether a recorded shape is one that the graph was captured with; a size that only data tell may be any."""
    sizes = [size if isinstance(size, int) else size.node.hint for size in wanted]
    return len(held) == len(sizes) and all(size in (None, own) for own, size in zip(held, sizes, strict=True))
