"""A captured model: its graph in the pre-dispatch ATen dialect, and what its inputs are called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node

from tokcompile.axes import Axes, infer
from tokcompile.weights import Weights

if TYPE_CHECKING:
    from tokcompile.decoding.carried import Carried


@dataclass
class Program:
    """One captured graph and what passes need to know of it.

    Attributes:
        gm: the graph module; every node carries its fake value in `meta["val"]`.
        fake_mode: the mode that the fake values belong to; new ones are made under it.
        kinds: for each placeholder, `parameter` (weights, buffers, constants), `input` (what the caller passes),
            `carried` (what an earlier graph handed on) or `size` (a symbolic size that capture made an input).
        origin: `dynamo` or `export`.
        weights: parameters that rules bring.
        carried: where numbers are kept that a prompt hands on to its steps; None where nobody keeps them.
        handed, taken: such numbers by name: values that this graph returns, and inputs that it takes.
    """

    gm: GraphModule
    fake_mode: FakeTensorMode
    kinds: dict[Node, str] = field(default_factory=dict)
    origin: str = "dynamo"
    weights: Weights = field(default_factory=Weights)
    carried: Carried | None = None
    handed: dict[str, Node] = field(default_factory=dict)
    taken: dict[str, Node] = field(default_factory=dict)
    _axes: Axes | None = None

    @property
    def graph(self) -> torch.fx.Graph:
        """The FX graph."""
        return self.gm.graph

    @property
    def output(self) -> Node:
        """The output node."""
        return self.graph.output_node()

    @property
    def axes(self) -> Axes:
        """Token axes of the graph as it is now; inferred once between edits."""
        if self._axes is None:
            self._axes = infer(self.graph)
        return self._axes

    def changed(self) -> None:
        """Forget what was inferred, after an edit."""
        self._axes = None

    def copy(self) -> Program:
        """The same graph once more, to be edited apart; values and constants are shared."""
        graph, twin = torch.fx.Graph(), {}
        result = graph.graph_copy(self.graph, twin)
        graph.output(result)
        graph.output_node().meta.update(self.output.meta)
        kinds = {twin[node]: kind for node, kind in self.kinds.items()}
        return Program(GraphModule(self.gm, graph), self.fake_mode, kinds, self.origin, self.weights, self.carried)

    def parameter(self, rule: str, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> Node:
        """A parameter that a rule brings, as a value of the graph; one node for all that ask for it.

        Args:
            rule, name: what it is called in `weights`.
            shape: its sizes.
            make: its initial value, on the device and of the dtype that it is to have.

        Raises:
            RuleError: the weights hold one of another shape.
        """
        held = self.weights.of(rule, name, shape, make)
        attribute = f"tokred_{rule}_{name}"
        found = next(iter(self.graph.find_nodes(op="get_attr", target=attribute)), None)
        if found is not None:
            return found
        self.gm.register_parameter(attribute, held)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.get_attr(attribute)
        node.meta["val"] = self.fake_mode.from_tensor(held, static_shapes=True)
        node.meta["weight"] = f"{rule}.{name}"
        self.kinds[node] = "parameter"
        return node

    def inputs(self, kind: str = "input") -> list[Node]:
        """Placeholders of one kind that hold tensors, in order; an exported program also has constants among them."""
        placeholders = (n for n in self.graph.nodes if n.op == "placeholder" and self.kinds.get(n) == kind)
        return [n for n in placeholders if isinstance(n.meta.get("val"), torch.Tensor)]


SIZES = {torch.ops.aten.sym_size.int, torch.ops.aten.sym_numel.default, torch.ops.aten.sym_stride.int}
"""Operators that read how large a value is, and nothing of what it holds."""


def place(node: Node) -> str:
    """Where a node comes from: its name, the module, and the last line of the model's source."""
    parts = [f"graph node '{node.name}' ({node.target})"]
    stack = node.meta.get("nn_module_stack")
    if stack:
        parts.append("module " + module_path(node))
    trace = (node.meta.get("stack_trace") or "").strip().splitlines()
    lines = [line.strip() for line in trace if line.strip().startswith("File ")]
    if lines:
        parts.append(lines[-1])
    return ", ".join(parts)


def module_path(node: Node) -> str:
    """Dotted path of the innermost module that a node was traced in; "" when unknown."""
    stack: dict[str, Any] | None = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return path.removeprefix("L['self'].").removeprefix("L['self']").removeprefix("L['fn'].")


def value(node: Node) -> Any:
    """Fake value of a node."""
    return node.meta["val"]


def tensor(node: Any) -> bool:
    """Whether an argument is a node that holds one tensor."""
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def arguments(node: Node) -> dict[str, Any]:
    """Arguments of a call of an operator by their names in its schema, defaults included."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value if a.has_default_value() else None) for a in schema}
