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
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
}
_NORMS = {aten.layer_norm.default}
EDITS = {
    torch.ops.tokred.gather_tokens.default,
    torch.ops.tokred.merge_pairs.default,
    torch.ops.tokred.insert_tokens.default,
    torch.ops.tokred.mix_tokens.default,
    torch.ops.tokred.mark_tokens.default,
    torch.ops.tokred.add_tokens.default,
}
"""Operators that edits put on the stream; the first argument is the stream as it was."""
_PASSED = VIEWS | EDITS


@dataclass(eq=False)
class Block:
    """One transformer block.

    Attributes:
        input, output: the residual stream before and after it, [B, T, C].
        attention: its self-attention; the attention to another sequence in a block that has no other.
        cross: attentions to another sequence that follow the self-attention within the block.
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
    cross: list[Attention] = field(default_factory=list)

    @property
    def middle(self) -> Node:
        """The stream between attention and feed-forward, as earlier edits left it."""
        node = self.merge
        while (edited := next((u for u in node.users if u.target in EDITS and u.args[0] is node), None)) is not None:
            node = edited
        return node


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
        within = _within(site, stream, by_merge, reach)
        if within is not None:
            within[1].cross.append(site)
            by_merge[merge] = within
            continue
        block = Block(site, stream, merge, merge, reach.above(site.node, output), _block_path(merge))
        stack = _previous(stream, by_merge, stacks)
        if stack.blocks:
            stack.blocks[-1].output = stream
        stack.blocks.append(block)
        by_merge[merge] = (stack, block)
    for stack in stacks:
        normed = all(u.target in _NORMS for view in _views(stack.blocks[0].merge) for u in _readers(view))
        stack.blocks[-1].output = _last_output(stack.blocks[-1], reach, normed)
    return stacks


def _within(
    site: Attention, stream: Node, by_merge: dict[Node, tuple[Stack, Block]], reach: Reach
) -> tuple[Stack, Block] | None:
    """The block that an attention to another sequence belongs to: it reads the stream right after the self-attention.

    After a whole block, feed-forward and all, such an attention makes a block of its own.
    """
    if reach.above(stream, site.key):
        return None
    while stream not in by_merge and stream.target in _PASSED | _NORMS:
        stream = stream.args[0]
    found = by_merge.get(stream)
    return found if found is not None and found[0].blocks[-1] is found[1] else None


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
    """The stack whose last addition the stream comes from through additions, norms, views and cuts; else a new one."""
    todo, seen = [stream], set()
    while todo:
        node = todo.pop()
        if node in by_merge:
            stack, block = by_merge[node]
            if stack.blocks[-1] is block:
                return stack
        if node not in seen and (_is_add(node) or node.target in _PASSED | _NORMS):
            seen.add(node)
            todo.extend(node.args if _is_add(node) else node.args[:1])
    stacks.append(Stack())
    return stacks[-1]


def _last_output(block: Block, reach: Reach, normed: bool) -> Node:
    """The stream after the last block: its last addition, or the norm after it where norms stand on the stream."""
    stream = _normed(block.merge) if normed else block.merge
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
        stream = _normed(added[0]) if normed else added[0]


def _normed(merge: Node) -> Node:
    return next((u for view in _views(merge) for u in view.users if u.target in _NORMS), merge)


def _readers(value: Node) -> list[Node]:
    return [u for u in value.users if u.target not in VIEWS]


def _views(value: Node) -> list[Node]:
    """A value and its views."""
    found = [value]
    for node in found:
        found += [u for u in node.users if u.target in VIEWS and u not in found]
    return found


def _block_path(merge: Node) -> str:
    return module_path(merge)
