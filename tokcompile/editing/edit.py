"""The only code that changes a graph: insert, rewire, and count what was done."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node, Proxy
from torch.fx.node import map_arg
from torch.fx.proxy import GraphAppendingTracer

from tokcompile.errors import EditError
from tokcompile.program import Program, place

Length = int | Node
"""A number of tokens: an int, or a node that holds a symbolic one."""

aten = torch.ops.aten


class Editor:
    """Edits one program for one step of a rule.

    Every node it makes gets its fake value at once, the module and source line of the node it stands before, and in
    `meta["custom"]` the rule's name (`tokred`) and, where one is known, the step's file, line and verb (`tokred_step`).
    """

    def __init__(self, program: Program, rule: str, counts: Counter[str] | None = None, step: str = "") -> None:
        self.program = program
        self.rule = rule
        self.step = step
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.made: set[Node] = set()
        self._anchor: Node | None = None
        self._sizes: dict[tuple[Node, int], Length] = {}

    @contextmanager
    def before(self, anchor: Node) -> Iterator[None]:
        """Insert nodes before the anchor while the context lasts."""
        outer, self._anchor = self._anchor, anchor
        try:
            yield
        finally:
            self._anchor = outer

    @contextmanager
    def after(self, nodes: Iterable[Node]) -> Iterator[None]:
        """Insert nodes right after the last of the given ones (after all inputs at the earliest)."""
        with self.before(self._following(nodes)):
            yield

    def _following(self, nodes: Iterable[Node]) -> Node:
        last = max(nodes, key=lambda n: n._sort_key).next
        sizes = set(self._sizes.values())
        while last.op == "placeholder" or last in sizes:  # what is inserted may use the sizes of its inputs
            last = last.next
        return last

    def call(self, target: Callable[..., Any], *args: Any, name: str | None = None, **kwargs: Any) -> Node:
        """Insert a call and give it its value."""
        if self._anchor is None:
            raise RuntimeError("Editor.call outside of Editor.before")
        with self.program.graph.inserting_before(self._anchor):
            node = self.program.graph.create_node("call_function", target, args, kwargs, name=name)
        self._finish(node)
        return node

    def parameter(self, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> Node:
        """A parameter that this rule brings; see `Program.parameter`."""
        node = self.program.parameter(self.rule, name, shape, make)
        self.made.add(node)
        return node

    def _finish(self, node: Node) -> None:
        for key in ("nn_module_stack", "stack_trace"):
            if self._anchor is not None and key in self._anchor.meta:
                node.meta[key] = self._anchor.meta[key]
        node.meta["custom"] = {"tokred": self.rule} | ({"tokred_step": self.step} if self.step else {})
        node.meta["val"] = self.evaluate(node)
        self.made.add(node)
        self.counts["inserted"] += 1

    def evaluate(self, node: Node) -> Any:
        """Run a node on the fake values of its arguments."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with self.program.fake_mode, enable_python_dispatcher(), torch.no_grad():
            try:
                return node.target(*args, **kwargs)
            except Exception as error:
                shapes = [
                    tuple(n.meta["val"].shape)
                    for n in node.all_input_nodes
                    if isinstance(n.meta.get("val"), torch.Tensor)
                ]
                raise EditError(
                    f"'{node.target}' does not fit the edited shapes",
                    where=[place(node)],
                    found=f"{error} with inputs {shapes}",
                ) from error

    def clone(self, node: Node, swap: dict[Node, Node], args: Sequence[Any] | None = None) -> Node:
        """Copy a node with some of its inputs swapped, and with other arguments if given."""
        with self.program.graph.inserting_before(self._anchor):
            copy = self.program.graph.node_copy(node)
        copy.args, copy.kwargs = map_arg((tuple(args or node.args), node.kwargs), lambda n: swap.get(n, n))
        self._finish(copy)
        return copy

    def set_args(self, node: Node, args: Iterable[Any]) -> None:
        """Replace all positional arguments of a node."""
        node.args = tuple(args)
        self.counts["repaired"] += 1

    def swap_input(self, user: Node, old: Node, new: Node) -> None:
        """Let a user read another value."""
        user.replace_input_with(old, new)
        self.counts["rewired"] += 1

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of a value read another one."""
        old.replace_all_uses_with(new)
        self.counts["rewired"] += 1

    def fix(self, old: Node, value: int) -> None:
        """Let all users of a number read a literal."""
        for user in list(old.users):
            user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: value if n is old else n)
        self.counts["rewired"] += 1

    # Sizes: integers where they are static, nodes where they are symbolic.

    def size(self, node: Node, dim: int) -> Length:
        """One size of a tensor value."""
        size = node.meta["val"].shape[dim]
        if isinstance(size, int):
            return size
        key = (node, dim % node.meta["val"].ndim)
        if key not in self._sizes:
            with self.after([node]):
                self._sizes[key] = self.call(aten.sym_size.int, node, key[1])
        return self._sizes[key]

    def arithmetic(self, compute: Callable[..., Any], *lengths: Length) -> Length:
        """Compute with lengths: in Python when all are ints, as nodes otherwise."""
        if all(isinstance(n, int) for n in lengths):
            return compute(*lengths)
        graph = self.program.graph
        tracer = GraphAppendingTracer(graph)
        before = set(graph.nodes)
        with graph.inserting_before(self._anchor):
            result = compute(*(Proxy(n, tracer) if isinstance(n, Node) else n for n in lengths))
        for node in graph.nodes:
            if node not in before:
                self._finish(node)
        return result.node if isinstance(result, Proxy) else result

    def require(self, condition: Node, message: str) -> None:
        """Check a condition (bool tensor) when the graph runs; asynchronous on a GPU."""
        every = self.call(aten.all.default, condition)
        plain = message.translate({ord(c): "'" for c in '"\\\n'})  # Inductor writes it between quotes in C++
        self.call(aten._assert_async.msg, every, plain)


def length_value(length: Length) -> Any:
    """The int or SymInt behind a length."""
    return length if isinstance(length, int) else length.meta["val"]


def add(left: Any, right: Any) -> Any:
    """Add two lengths, for `Editor.arithmetic`."""
    return operator.add(left, right)


def sub(left: Any, right: Any) -> Any:
    """Subtract two lengths, for `Editor.arithmetic`."""
    return operator.sub(left, right)
