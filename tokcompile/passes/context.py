"""What the passes of one rule share while it is applied to one program."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim, resolve
from tokcompile.edit import Editor, Length
from tokcompile.errors import EditError
from tokcompile.positional import hint
from tokcompile.program import Program
from tokcompile.sites import Sites, find_sites

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per token, float32 [B, T]; a large one means keep."""

    node: Node
    axis: Dim


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen tokens of a sequence.

    Attributes:
        mask: bool [B, T], True for the chosen.
        axis: the sequence.
        group: bool [B, T], the tokens that were up for choice; None for all.
        size, count: how many were up for choice, and how many are chosen, per row.
    """

    mask: Node
    axis: Dim
    group: Node | None
    size: Length
    count: Length


@dataclass
class Context:
    """State of one rule's application: never kept on a rule or a pass.

    Attributes:
        budget: resolves a select step's budget against a group's size.
        values: what earlier steps made, by name.
        log: one record per step, for reports.
    """

    program: Program
    editor: Editor
    sites: Sites
    instance: Any
    values: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def refresh(self) -> None:
        """Match the sites again, after an edit."""
        self.program.changed()
        self.sites = find_sites(self.program)
        self.editor = Editor(self.program, self.editor.rule, self.counts)

    def token_dim(self, node: Node, owner: str) -> int:
        """The dimension of a value that counts the tokens of a stack's sequence."""
        dims = self.program.axes.of(node)
        if len(dims) == 3:
            return 1
        raise EditError("this value has no token dimension of its own", found=f"'{node.name}' of {owner} is "
                        f"{tuple(node.meta['val'].shape)}")

    def image_mask(self, axis: Dim) -> Node:
        """bool [B, T] on a text axis: where image features stand."""
        splice = self.sites.splice
        if splice is None:
            raise EditError("no image tokens in this graph", found="no splice of image features",
                            remedy="call the model with an image, or select among text or all")
        mask = self.editor.call(aten.select.int, splice.mask, -1, 0)
        return self.align(mask, self.program.axes.of(splice.node)[1], axis)

    def valid_mask(self, axis: Dim) -> Node | None:
        """bool [B, T] on a text axis: real tokens; None when the graph has no padding mask."""
        padding = self.sites.padding
        text = self.sites.text_stack()
        if padding is None or text is None:
            return None
        start = self.program.axes.of(text[1].blocks[0].input)[1]
        mask = self.editor.call(aten.ne.Scalar, padding, 0)
        origin = oldest(start)
        return self.align(mask, origin, axis)

    def align(self, value: Node, start: Dim, goal: Dim, fill: float | None = None) -> Node:
        """Bring a value [B, T] from one axis to another that was cut from it, or that is a segment of it."""
        start, goal = resolve(start), resolve(goal)
        if start == goal:
            return value
        segment = _segment_start(start, goal)
        if segment is not None:
            offset, size = segment
            return self.editor.call(aten.slice.Tensor, value, 1, offset, offset + size)
        chain = _chain(start, goal)
        if chain is not None:
            for via in chain:
                value = self.editor.call(tokred.gather_tokens.default, value, via, 1, 0)
            return value
        spliced = self._through_splice(value, start, goal, fill)
        if spliced is not None:
            return spliced
        raise EditError("scores of one sequence cannot be used for another", found=f"{start} against {goal}",
                        remedy="score and drop the same tokens")

    def _through_splice(self, value: Node, start: Dim, goal: Dim, fill: float | None) -> Node | None:
        """From image features to the text sequence that they are spliced into."""
        splice = self.sites.splice
        if splice is None or fill is None:
            return None
        axes = self.program.axes
        features = axes.of(splice.features)
        image = next((d for d in features if d[-len(start):] == start), None)
        inner = start if image is not None else _inner_segment(start, features)
        if inner is None:
            return None
        value = self.align(value, start, inner)
        mask = self.editor.call(aten.select.int, splice.mask, -1, 0)
        placed = self.editor.call(tokred.splice_values.default, mask, value, fill)
        return self.align(placed, axes.of(splice.node)[1], goal)


def oldest(axis: Dim) -> Dim:
    """The axis that a chain of cuts began with."""
    axis = resolve(axis)
    while len(axis) == 1 and axis[0].origin is not None:
        axis = resolve(axis[0].origin)
    return axis


def _segment_start(start: Dim, goal: Dim) -> tuple[int, int] | None:
    """Offset and length of `goal` within the concatenation `start`."""
    if len(start) != 1 or start[0].segments is None:
        return None
    offset = 0
    for segment in start[0].segments:
        size = 1
        for atom in resolve(segment):
            size = size * atom.size
        if resolve(segment) == goal and isinstance(offset, int) and isinstance(size, int):
            return offset, size
        offset = offset + size
    return None


def _inner_segment(start: Dim, features: list[Dim]) -> Dim | None:
    """The segment of a concatenation (CLS and patches) that image features are made of."""
    if len(start) != 1 or start[0].segments is None:
        return None
    for segment in map(resolve, start[0].segments):
        if segment and any(d[-len(segment):] == segment for d in features):
            return segment
    return None


def _chain(start: Dim, goal: Dim) -> list[Node] | None:
    """The index nodes that lead from an axis to one that was cut from it."""
    chain: list[Node] = []
    while goal != start:
        if len(goal) != 1 or goal[0].origin is None:
            return None
        chain.insert(0, goal[0].via)
        goal = resolve(goal[0].origin)
    return chain


def rows_of(ctx: Context, node: Node) -> int:
    """Batch rows of a value, as seen at capture."""
    return hint(node.meta["val"].shape[0])
