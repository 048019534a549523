"""What axis rules share: the dimensions found so far, and arguments by schema name."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from tokcompile.axes.atoms import Dim, resolve, size_of, unify

Dims = list[Dim]
MAX = 2**62  # slice ends at or past this mean "to the end"


class Context:
    """What a rule sees of the graph: the dimensions found so far, and arguments by schema name."""

    def __init__(self) -> None:
        self.dims: dict[Node, Any] = {}
        self.conflicts: list[tuple[Node, str]] = []

    def of(self, node: Any) -> Dims:
        """Dimensions of a tensor node, most significant first; [] for anything else."""
        return self.dims.get(node, []) if isinstance(node, Node) else []

    def unify(self, node: Node, left: Dim, right: Dim) -> None:
        """Unify and remember a conflict with the node that asked for it."""
        if not unify(left, right):
            self.conflicts.append((node, f"{resolve(left)} against {resolve(right)}"))


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """One argument of an operator call, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def shape(node: Node) -> list[Any]:
    """Sizes of a node's (first) result as ints or expressions."""
    value = node.meta["val"]
    return [size_of(s) for s in value.shape]


def wrap(dim: int, rank: int) -> int:
    """Give a negative dimension its positive number."""
    return dim + rank if dim < 0 else dim


def is_empty(node: Node) -> bool:
    """Whether a value is the tensor without elements that a fresh KV cache starts from; adds no guard."""
    shape = node.meta["val"].shape
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0
