"""Blocks and stacks: attention sites strung on a residual stream, found by structure."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

import tokcompile.kernels  # noqa: F401  registers tokred::gather_tokens, which earlier edits put on the stream
from tokcompile.program import module_path
from tokcompile.sites.attention import Attention
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
}
_PASSED = _VIEWS | {torch.ops.tokred.gather_tokens.default}


@dataclass(eq=False)
class Block:
    """One transformer block.

    Attributes:
        input, output: the residual stream before and after it, [B, T, C].
        attention: its self-attention.
        merge: the addition that brings the attention's result back to the stream.
        live: whether the model's outputs depend on its attention.
        path: module path, for display only.
    """

    attention: Attention
    input: Node
    merge: Node
    output: Node
    live: bool = True
    path: str = ""


@dataclass(eq=False)
class Stack:
    """An ordered run of blocks on one residual stream."""

    name: str = ""
    blocks: list[Block] = field(default_factory=list)

    @property
    def features(self) -> int:
        """Index of the last block that the model's outputs depend on."""
        return max(i for i, block in enumerate(self.blocks) if block.live)


def find_stacks(sites: list[Attention], reach: Reach, output: Node) -> list[Stack]:
    """String attention sites into stacks, in graph order."""
    by_merge: dict[Node, tuple[Stack, Block]] = {}
    stacks: list[Stack] = []
    for site in sites:
        found = _residual(site, reach)
        if found is None:
            continue
        stream, merge = found
        block = Block(site, stream, merge, merge, reach.above(site.node, output), _block_path(merge))
        stack = _previous(stream, by_merge, stacks)
        if stack.blocks:
            stack.blocks[-1].output = stream
        stack.blocks.append(block)
        by_merge[merge] = (stack, block)
    for stack in stacks:
        stack.blocks[-1].output = _last_output(stack.blocks[-1], reach)
    return stacks


def _is_add(node: Node) -> bool:
    return (
        node.target is aten.add.Tensor
        and len(node.args) == 2
        and all(isinstance(a, Node) and isinstance(a.meta.get("val"), torch.Tensor) for a in node.args)
    )


def _residual(site: Attention, reach: Reach) -> tuple[Node, Node] | None:
    """The stream that an attention reads and the addition where its result joins it again."""
    inside = set()
    for count, node in enumerate(reach.forward(site.node)):
        if count > 80:
            return None
        if _is_add(node):
            for own, other in (node.args, reversed(node.args)):
                alike = len(other.meta["val"].shape) == len(node.meta["val"].shape)
                if own in inside and other not in inside and alike and reach.above(other, site.query):
                    return other, node
        inside.add(node)
    return None


def _previous(stream: Node, by_merge: dict[Node, tuple[Stack, Block]], stacks: list[Stack]) -> Stack:
    """The stack whose last addition the stream comes from through additions, views and cuts alone; else a new one."""
    todo, seen = [stream], set()
    while todo:
        node = todo.pop()
        if node in by_merge:
            stack, block = by_merge[node]
            if stack.blocks[-1] is block:
                return stack
        if node not in seen and (_is_add(node) or node.target in _PASSED):
            seen.add(node)
            todo.extend(node.args if _is_add(node) else node.args[:1])
    stacks.append(Stack())
    return stacks[-1]


def _last_output(block: Block, reach: Reach) -> Node:
    stream = block.merge
    while True:
        following = [
            (u, other)
            for view in _views(stream)
            for u in view.users
            if _is_add(u)
            for other in u.args
            if other is not view
        ]
        added = [u for u, other in following if reach.above(block.input, other)]
        if not added:
            rank = block.input.meta["val"].ndim
            return next((v for v in _views(stream) if v.meta["val"].ndim == rank), stream)
        stream = added[0]


def _views(value: Node) -> list[Node]:
    """A value and its views."""
    found = [value]
    for node in found:
        found += [u for u in node.users if u.target in _VIEWS and u not in found]
    return found


def _block_path(merge: Node) -> str:
    return module_path(merge)
