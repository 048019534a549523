"""Find all sites of a program and give its stacks their names."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.fx import Node

from tokcompile.program import Program
from tokcompile.sites.attention import Attention, find_attention
from tokcompile.sites.block import Block, Stack, find_stacks
from tokcompile.sites.cache import Cache, find_cache
from tokcompile.sites.pooling import Pooling, find_pooling
from tokcompile.sites.projector import Projector, find_projector, find_read_projector
from tokcompile.sites.reach import Reach
from tokcompile.sites.rotary import Rotary, find_rotary
from tokcompile.sites.sight import hidden_by, is_causal, rows_of_integers
from tokcompile.sites.splice import CONVOLUTIONS, Splice, find_splice

aten = torch.ops.aten
_NAME = "tokred_stack"


@dataclass
class Sites:
    """Everything that a rule can address in one program.

    Attributes:
        stacks: by name, `vision`, `decoder` or `encoder` (a second one of a kind gets a number).
        loose: attention sites that belong to no residual stream.
        paddings: by stack, the caller's two-dimensional padding mask of a text sequence.
        phase: `prefill`, or `decode` when the decoder reads a cache that already holds tokens.
    """

    attentions: list[Attention]
    stacks: dict[str, Stack]
    loose: list[Attention]
    splice: Splice | None
    projector: Projector | None
    rotary: dict[str, list[Rotary]]
    caches: dict[Block, Cache]
    paddings: dict[str, Node]
    embedding: Node | None
    head: Node | None
    reach: Reach = field(repr=False)
    pooling: Pooling | None = None

    @property
    def phase(self) -> str:
        """Whether this graph begins a sequence or continues one."""
        return "decode" if any(c.past is not None for c in self.caches.values()) else "prefill"

    @property
    def padding(self) -> Node | None:
        """The padding mask of the text stack; None without one."""
        text = self.text_stack()
        return self.paddings.get(text[0]) if text is not None else None

    def text_stack(self) -> tuple[str, Stack] | None:
        """The stack that reads token embeddings: the decoder, else the encoder."""
        for name in ("decoder", "encoder"):
            if name in self.stacks:
                return name, self.stacks[name]
        return None


def find_sites(program: Program) -> Sites:
    """Match every site of a program, by structure alone."""
    graph = program.graph
    reach = Reach(graph)
    attentions = find_attention(graph)
    splice = find_splice(graph, reach, program.inputs())
    found = find_stacks(attentions, reach, program.output)
    outputs = set(program.output.all_input_nodes)
    caches = {b: c for s in found for b in s.blocks if (c := find_cache(b, outputs)) is not None}
    stacks = _named(found, splice, caches, reach)
    vision = stacks.get("vision")
    projector = None
    if vision is not None:
        blocks = [block for stack in stacks.values() for block in stack.blocks]
        each = ((block, site) for block in blocks for site in (block.attention, *block.cross))
        readers = [site for block, site in each if not reach.above(block.input, site.key)]
        projector = find_projector(vision, splice, reach) if splice else find_read_projector(vision, readers, reach)
    strung = {a for s in found for b in s.blocks for a in (b.attention, *b.cross)}
    sites = Sites(
        attentions,
        stacks,
        [a for a in attentions if a not in strung],
        splice,
        projector,
        {name: find_rotary(s, reach, program.axes) for name, s in stacks.items()},
        caches,
        {},
        None,
        None,
        reach,
    )
    if projector is not None:
        sites.pooling = find_pooling(projector, reach, program.axes)
    for name, stack in stacks.items():
        padding = _padding(program, stack, reach, _embedding(program, stack, reach))
        if padding is not None:
            sites.paddings[name] = padding
    text = sites.text_stack()
    if text is not None:
        sites.embedding = _embedding(program, text[1], reach)
        sites.head = _head(text[1], program.output, reach)
    return sites


def _named(found: list[Stack], splice: Splice | None, caches: dict[Block, Cache], reach: Reach) -> dict[str, Stack]:
    images = [n for n in reach.order if n.target in CONVOLUTIONS and n.meta["val"].ndim > 3]
    out: dict[str, Stack] = {}
    for stack in found:
        entry, first = stack.blocks[0].input, stack.blocks[0].attention.node
        if _NAME in first.meta:  # before an edit, which may hide what it is known by
            stack.name = first.meta[_NAME]
            out[stack.name] = stack
            continue
        spliced = splice is not None and reach.above(splice.node, entry)
        seen = splice is not None and reach.above(entry, splice.features)
        if (reach.any_above(entry, images) or seen) and not spliced:
            kind = "vision"
        elif any(b in caches for b in stack.blocks) or is_causal(stack.blocks[0].attention, reach):
            kind = "decoder"
        else:
            kind = "encoder"
        name, count = kind, 1
        while name in out:
            count += 1
            name = f"{kind}{count}"
        stack.name = first.meta[_NAME] = name
        out[name] = stack
    return out


def _padding(program: Program, stack: Stack, reach: Reach, embedding: Node | None) -> Node | None:
    """The caller's two-dimensional padding mask: an integer or bool input that reaches attention as a mask.

    One that reaches nothing else comes first; learned positions may be counted from it too, token numbers never are.
    Where several reach the mask, kinds of tokens are told from padding by what a 0 does: padding hides the key.
    """
    site = stack.blocks[0].attention
    mask = site.padding if site.padding is not None else site.mask
    if mask is None:
        return None
    start = stack.blocks[0].input
    found = [
        n
        for n in program.inputs()
        if rows_of_integers(n)
        and reach.above(n, mask)
        and not (embedding is not None and reach.above(n, embedding.args[1]))
    ]
    if len(found) > 1:
        found = [n for n in found if _hides_keys(mask, reach, n)] or found
    return min(found, key=lambda n: reach.above(n, start), default=None)


def _hides_keys(mask: Node, reach: Reach, padding: Node) -> bool:
    hidden = hidden_by(mask, reach, padding)
    return hidden is not None and bool(hidden.all())


def _embedding(program: Program, stack: Stack, reach: Reach) -> Node | None:
    """The token embedding lookup: its indices come from the caller."""
    inputs = program.inputs()
    for node in reach.order:
        if (
            node.target is aten.embedding.default
            and reach.any_above(node.args[1], inputs)
            and reach.above(node, stack.blocks[0].input)
        ):
            return node
    return None


def _head(stack: Stack, output: Node, reach: Reach) -> Node | None:
    """The last linear map between the stack and an output of the graph, which may cap or scale what it gives."""
    stream = stack.blocks[-1].output
    for node in reversed(list(reach.order)):
        if node.target is aten.linear.default and reach.above(node, output) and reach.above(stream, node):
            return node
    return None
