"""Small parts of a graph run on real values, to see what a mask hides."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from tokcompile.sites.reach import Reach

MAX_NODES = 200
MAX_ELEMENTS = 1 << 26


def evaluate(node: Node, reach: Reach, zeros: Collection[Node | None] = ()) -> torch.Tensor | None:
    """The value of a node whose ancestors are few, when every integer input is 1 but for some, and every other one 0.

    So a padding mask says that each token is real, and a bias that a model has learnt counts for nothing. Symbolic
    sizes are those seen at capture.

    Returns:
        None when the value has many ancestors, is large, or cannot be computed.
    """
    above = reach.ancestors([node])
    elements = _elements(node)
    if len(above) > MAX_NODES or elements is None or elements > MAX_ELEMENTS:
        return None
    values: dict[Node, Any] = {}
    try:
        for each in sorted(above, key=reach.order.__getitem__):
            values[each] = torch.zeros_like(_run(each, values)) if each in zeros else _run(each, values)
    except Exception:  # whatever fails here, the mask is then not known
        return None
    return values[node]


def call(node: Node, values: Mapping[Node, Any]) -> Any:
    """What a call gives on known arguments; on the CPU, wherever the model lives."""
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    args = tuple(torch.device("cpu") if isinstance(a, torch.device) else a for a in args)
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _run(node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "call_function":
        return call(node, values)
    fake = node.meta["val"]
    if not isinstance(fake, torch.Tensor):
        return fake if isinstance(fake, (int, float)) else fake.node.hint
    shape = [size if isinstance(size, int) else size.node.hint for size in fake.shape]
    return torch.zeros(shape, dtype=fake.dtype) if fake.dtype.is_floating_point else torch.ones(shape, dtype=fake.dtype)


def _elements(node: Node) -> int | None:
    """How many numbers a value has; None where that is known only when the model runs."""
    total = 1
    for size in node.meta["val"].shape:
        known = size if isinstance(size, int) else size.node.hint
        if known is None:
            return None
        total *= known
    return total
