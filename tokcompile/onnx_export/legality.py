"""What may stand in a graph that goes to a target, and who put there what may not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from tokcompile.errors import LowerError
from tokcompile.program import arguments, place

aten = torch.ops.aten

Reason = tuple[str, str]
"""What is wrong with a call, and what to do instead."""


@dataclass(frozen=True)
class Target:
    """A runtime and what it cannot do.

    Attributes:
        most: the greatest number of values that a TopK, and so a sort, may return; None for any.
        calls: for operators that it has in some cases only, what is wrong with a call; None where nothing is.
    """

    name: str
    most: int | None = None
    calls: dict[Any, Callable[[Node], Reason | None]] = field(default_factory=dict)

    def refuses(self, node: Node) -> Reason | None:
        """What is wrong with a call for this target."""
        check = self.calls.get(node.target)
        return (check(node) if check else None) or self._too_many(node)

    def _too_many(self, node: Node) -> Reason | None:
        if self.most is None or node.target not in _RANKED:
            return None
        count = _RANKED[node.target](node)
        if isinstance(count, int) and count <= self.most:
            return None
        if isinstance(count, int):
            return f"a TopK of {count} values, and {self.name} takes at most {self.most}", "a smaller budget"
        return (
            f"a TopK of an open number of values, and {self.name} takes a fixed one",
            "fixed sizes, or a fixed budget",
        )


def _scatter(node: Node) -> Reason | None:
    """The exporter writes a scatter of means as one without any reduction: wrong values, and no warning."""
    if arguments(node)["reduce"] != "mean":
        return None
    return "ONNX has no scatter that takes means", "scatter sums and counts, and divide"


def _bits(node: Node) -> Reason | None:
    source, wanted = arguments(node)["self"].meta["val"].dtype, arguments(node)["dtype"]
    if (source, wanted) == (torch.float32, torch.int32):
        return None
    return f"ONNX has no operator that reads bits of {source} as {wanted}", "read float32 as int32"


def _distance(node: Node) -> Reason | None:
    p = arguments(node)["p"]
    return None if p == 2 else (f"distances of norm {p} have no form", "Euclidean distances")


def _sorted_size(node: Node) -> Any:
    found = arguments(node)
    return found["self"].meta["val"].shape[found["dim"]]


_RANKED: dict[Any, Callable[[Node], Any]] = {
    aten.topk.default: lambda node: arguments(node)["k"],
    aten.sort.default: _sorted_size,
    aten.sort.stable: _sorted_size,
}
"""Operators that become a TopK, and of how many values."""

ONNX = Target(
    "onnx",
    calls={
        aten.scatter_reduce.two: _scatter,
        aten.view.dtype: _bits,
        aten._cdist_forward.default: _distance,
    },
)


def _spread_scatter(node: Node) -> Reason | None:
    found = arguments(node)
    index, into = (found[name].meta["val"].shape for name in ("index", "self"))
    small = [axis for axis, (most, size) in enumerate(zip(into, index, strict=True)) if _is_less(most, size)]
    if not small:
        return None
    return f"a scatter of {list(index)} values into {list(into)}: TensorRT takes no more than there is room for", (
        "scatter into a larger tensor, and cut it"
    )


def _is_less(one: Any, other: Any) -> bool:
    return isinstance(one, int) and isinstance(other, int) and one < other


def _without_form(what: str, instead: str) -> Callable[[Node], Reason | None]:
    return lambda node: (f"TensorRT has no {what}", instead)


def _whole(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype != torch.bool


def _bitwise(node: Node) -> Reason | None:
    return ("TensorRT has no operators on the bits of numbers", "another rule or option") if _whole(node) else None


TENSORRT = Target(
    "tensorrt",
    most=3840,
    calls={
        **ONNX.calls,
        aten.scatter.src: _spread_scatter,
        aten.scatter.value: _spread_scatter,
        aten.scatter_add.default: _spread_scatter,
        aten.nonzero.default: _without_form("sizes that depend on data without its plugins", "a mask"),
        **dict.fromkeys(
            (
                aten.bitwise_and.Tensor,
                aten.bitwise_and.Scalar,
                aten.bitwise_or.Tensor,
                aten.bitwise_or.Scalar,
                aten.bitwise_xor.Tensor,
                aten.bitwise_xor.Scalar,
                aten.__lshift__.Scalar,
                aten.__rshift__.Scalar,
                aten.bitwise_left_shift.Tensor_Scalar,
                aten.bitwise_right_shift.Tensor_Scalar,
            ),
            _bitwise,
        ),
    },
)
TARGETS = {target.name: target for target in (ONNX, TENSORRT)}


def check(decomposed: ExportedProgram, rewritten: ExportedProgram, target: Target) -> None:
    """Refuse a decomposed program with a call that a target cannot do, or does wrongly.

    Raises:
        LowerError: with the operator, the tokred operator and the rule's step, or the line of the model, it comes from.
    """
    for node in decomposed.graph.nodes:
        reason = target.refuses(node) if node.op == "call_function" else None
        if reason is not None:
            raise refused(node, rewritten, *reason)


def refused(node: Node, rewritten: ExportedProgram, cause: str, remedy: str) -> LowerError:
    """The error for a node of a decomposed program."""
    return LowerError(cause, where=provenance(node, rewritten), found=str(node.target), remedy=remedy)


def provenance(node: Node, rewritten: ExportedProgram) -> list[str]:
    """Where a node of a decomposed program comes from: rule, step, `tokred` operator, and place in the model."""
    origin = origin_of(node, calls(rewritten))
    return [*brought_by(node, origin).values(), place(origin if origin is not None else node)]


def calls(program: ExportedProgram) -> dict[str, Node]:
    """Calls of a program by their names."""
    return {node.name: node for node in program.graph.nodes if node.op == "call_function"}


def origin_of(node: Node, known: dict[str, Node]) -> Node | None:
    """The node of the rewritten program, one of `known`, that a decomposition made a node from."""
    sources = list(node.meta.get("from_node") or ())
    while sources:
        source = sources.pop()
        if source.name in known:
            return known[source.name]
        sources.extend(source.from_node or ())
    return None


def brought_by(node: Node, origin: Node | None) -> dict[str, str]:
    """The `step` of a rule and the `operator` of tokred that a node was made for; neither for the model's own."""
    made = node.meta.get("custom") or (origin.meta.get("custom") if origin is not None else None) or {}
    found = {}
    if "tokred" in made:
        found["step"] = " ".join(filter(None, [f"rule '{made['tokred']}'", made.get("tokred_step", "")]))
    if origin is not None and str(origin.target).startswith("tokred."):
        found["operator"] = f"operator tokred::{str(origin.target).split('.')[1]}"
    return found


def untranslated(error: Exception, rewritten: ExportedProgram) -> LowerError:
    """The error for an operator that the exporter has no ONNX form of, from what the exporter says."""
    said = _causes(error)
    found = re.search(r"target=torch\.ops\.(\w+)\.(\w+)\.(\w+)", said)
    if found is None:
        return LowerError(
            "torch could not write the model as ONNX",
            found=said.strip().splitlines()[0] if said.strip() else type(error).__name__,
            remedy="the error before this one has the whole account",
        )
    operator = getattr(getattr(getattr(torch.ops, found[1]), found[2]), found[3])
    table = torch.export.default_decompositions()
    table.pop(operator, None)
    left = [n for n in rewritten.run_decompositions(table).graph.nodes if n.target == operator]
    cause, remedy = f"{found[1]}::{found[2]} has no form in ONNX", "another rule or option, or another spelling of it"
    if not left:
        return LowerError(cause, found=f"{found[1]}.{found[2]}.{found[3]}", remedy=remedy)
    return refused(left[0], rewritten, cause, remedy)


def _causes(error: BaseException | None) -> str:
    lines = []
    while error is not None:
        lines.append(str(error))
        error = error.__cause__
    return "\n".join(reversed(lines))
