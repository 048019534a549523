"""Bring a captured graph to one spelling: operators that change nothing are taken out before anything is matched."""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from tokcompile.axes.atoms import same, size_of
from tokcompile.axes.context import is_empty
from tokcompile.capturing.blocksplice import scatter_blocks
from tokcompile.capturing.maskedadd import PUTS, sum_under_mask
from tokcompile.capturing.rejoin import rejoin

aten = torch.ops.aten
_CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten.alias.default,
    aten.contiguous.default,
}
_COPY = aten.copy_.default
_BUFFERS = {aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default}


def canonicalise(graph: Graph) -> int:
    """Remove casts, slices and concatenations that return their input, and constants nobody reads.

    A buffer that is filled part by part becomes the concatenation that it is, rows that are increased under a mask
    become a sum, and features that are looked up for each of a text's image tokens are scattered.

    Returns:
        How many nodes were removed. Results of the graph stay bit-for-bit the same.
    """
    before = len(graph.nodes)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _BUFFERS:
            _join_parts(graph, node)
            continue
        if node.target in PUTS:
            sum_under_mask(graph, node)
            continue
        if node.target is aten.where.self and scatter_blocks(graph, node):
            continue
        if node.target is aten.cat.default and rejoin(graph, node):
            continue
        if node.target is aten.narrow.default and all(isinstance(n, int) and n >= 0 for n in node.args[2:4]):
            value, dim, start, length = node.args  # a slice under another name
            node.target, node.args = aten.slice.Tensor, (value, dim, start, start + length)
        kept = _passes_through(node)
        if kept is not None:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
    _drop_dead_constants(graph)
    return before - len(graph.nodes)


def _join_parts(graph: Graph, buffer: Node) -> None:
    """Turn an empty tensor into whose slices along one dimension values are copied into their concatenation."""
    parts = [u for u in buffer.users if u.target is aten.slice.Tensor and [c.target for c in u.users] == [_COPY]]
    copies = [next(iter(p.users)) for p in parts]
    readers = [u for u in buffer.users if u not in parts]
    dims = {p.args[1] for p in parts}
    if len(parts) < 2 or len(dims) != 1 or not readers or any(c.users for c in copies):
        return
    (dim,) = dims
    order = {n: i for i, n in enumerate(graph.nodes)}
    last = max(order[c] for c in copies)
    if not _covers(buffer, parts, dim) or any(order[r] < last for r in readers):
        return
    if not all(_fills(c.args[1].meta["val"], p.meta["val"]) for p, c in zip(parts, copies, strict=True)):
        return
    with graph.inserting_before(min(readers, key=order.__getitem__)):
        joined = graph.call_function(aten.cat.default, ([c.args[1] for c in copies], dim))
    joined.meta = dict(copies[-1].meta) | {"val": buffer.meta["val"]}
    for node in copies + parts:
        graph.erase_node(node)
    buffer.replace_all_uses_with(joined)
    graph.erase_node(buffer)


def _fills(value: torch.Tensor, part: torch.Tensor) -> bool:
    """Whether copying a value into a part neither casts nor broadcasts it."""
    alike = value.dtype == part.dtype and value.ndim == part.ndim
    return alike and all(same(size_of(a), size_of(b)) for a, b in zip(value.shape, part.shape, strict=True))


def _covers(buffer: Node, parts: list[Node], dim: int) -> bool:
    offset: object = 0
    for part in parts:
        start, end = part.args[2] or 0, part.args[3]
        size = part.meta["val"].shape[dim]
        if not isinstance(size, int) or start != offset or len(part.args) > 4 or end < start + size:
            return False
        offset = start + size
    return offset == buffer.meta["val"].shape[dim]


def _passes_through(node: Node) -> Node | None:
    if node.target is aten.cat.default:
        return _joined_with_nothing(node)
    first = node.args[0] if node.args else None
    if not isinstance(first, Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    if node.target in _CASTS:
        return first if _alike(first, node) and not _wants_copy(node) else None
    if node.target is aten.slice.Tensor and _whole(node):
        return first
    return None


def _alike(one: Node, other: Node) -> bool:
    left, right = one.meta["val"], other.meta["val"]
    return (
        left.dtype == right.dtype
        and left.device == right.device
        and left.layout == right.layout
        and all(same(size_of(a), size_of(b)) for a, b in zip(left.stride(), right.stride(), strict=True))
    )


def _wants_copy(node: Node) -> bool:
    names = [a.name for a in node.target._schema.arguments]
    copy = node.kwargs.get("copy")
    if copy is None and "copy" in names and len(node.args) > names.index("copy"):
        copy = node.args[names.index("copy")]
    return bool(copy)


def _whole(node: Node) -> bool:
    """Whether a slice returns all of its input: its result is as long, as that of a window wider than the sequence."""
    args = [*node.args[1:], *[None] * 4][:4]
    dim, step = (node.kwargs.get(n, a) for n, a in zip(("dim", "step"), (args[0], args[3]), strict=True))
    before, after = (n.meta["val"].shape[dim or 0] for n in (node.args[0], node))
    return step in (None, 1) and same(size_of(before), size_of(after))


def _joined_with_nothing(node: Node) -> Node | None:
    """The operand of a concatenation whose others are the empty tensors that a fresh KV cache starts from.

    One that is laid out otherwise than the result becomes a copy: a product of matrices depends on their layout, in
    its last bits.
    """
    full = [v for v in node.args[0] if not is_empty(v)]
    if len(full) != 1 or len(node.args[0]) == 1:
        return None
    if _alike(full[0], node):
        return full[0]
    node.target, node.args = aten.clone.default, (full[0],)
    node.kwargs = {"memory_format": torch.contiguous_format}
    return None


def _drop_dead_constants(graph: Graph) -> None:
    for node in reversed(list(graph.nodes)):
        dead_constant = node.op == "get_attr" or node.target in (aten.lift_fresh_copy.default, aten.detach_.default)
        if dead_constant and not node.users:
            graph.erase_node(node)
