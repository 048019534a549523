"""What the passes of one rule share while it is applied to one program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.axes.context import MAX
from tokcompile.editing.edit import Editor, Length
from tokcompile.editing.tokenmap import slots_of
from tokcompile.errors import EditError
from tokcompile.program import Program
from tokcompile.sites import Attention, Sites, find_sites

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class Scores:
    """One number per token, float32 [B, T]; a large one means keep.

    `owner` is the stack at whose address they were made; it may have looked at another sequence than its own.
    """

    node: Node
    axis: Dim
    owner: str = ""


@dataclass(frozen=True, eq=False)
class Selection:
    """Chosen tokens of a sequence.

    Attributes:
        mask: bool [B, T], True for the chosen.
        axis: the sequence.
        group: bool [B, T], the tokens that were up for choice; None for all.
        size, count: how many were up for choice, and how many are chosen, per row.
        kind: what these tokens are: `image`, `text` or `all`.
    """

    mask: Node
    axis: Dim
    group: Node | None
    size: Length
    count: Length
    kind: str = "image"


@dataclass
class Context:
    """State of one rule's application: never kept on a rule or a pass.

    Attributes:
        budget: resolves a select step's budget against a group's size.
        values: what earlier steps made, by name.
        log: one record per step, for reports.
        shortened: in a later step, whether rules made the cache of the prompt shorter.
    """

    program: Program
    editor: Editor
    sites: Sites
    instance: Any
    values: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    shortened: bool = False

    def refresh(self) -> None:
        """Match the sites again, after an edit."""
        self.program.changed()
        self.sites = find_sites(self.program)
        self.editor = Editor(self.program, self.editor.rule, self.counts, self.editor.step)

    def renew(self) -> None:
        """Match the sites again, after an edit that changed no axis: what earlier steps made stays valid."""
        self.refresh()
        for name, made in self.values.items():
            if isinstance(made, Scores | Selection):
                dims = self.program.axes.of(made.node if isinstance(made, Scores) else made.mask)
                self.values[name] = replace(made, axis=dims[1])

    def image_mask(self, axis: Dim) -> Node:
        """bool [B, T] on a text axis: where features of images and videos stand."""
        splice = self.sites.splice
        if splice is None:
            raise EditError(
                "no image tokens in this graph",
                found="no splice of image features",
                remedy="call the model with an image, or select among text or all",
            )
        masks = [self.editor.call(aten.select.int, each.mask, -1, 0) for each in splice.all]
        mask = reduce(lambda one, other: self.editor.call(aten.logical_or.default, one, other), masks)
        start = self.program.axes.of(splice.node)[1]
        marked = self._through_marks(mask, start, axis, lambda slots: self.editor.call(aten.ge.Scalar, slots, 0))
        return self.align(mask, start, axis) if marked is None else marked

    def stack_of(self, axis: Dim) -> str | None:
        """The name of the stack whose sequence an axis is, as it was or after cuts."""
        start = oldest(axis)
        for name, stack in self.sites.stacks.items():
            dims = self.program.axes.of(stack.blocks[0].input)
            if len(dims) == 3 and oldest(dims[1]) == start:
                return name
        return None

    def valid_mask(self, axis: Dim) -> Node | None:
        """bool [B, T] on a text axis: real tokens; None when every token is one: the graph has no padding mask for it.

        Markers are real tokens, and empty slots are none.
        """
        name = self.stack_of(axis)
        padding = self.sites.paddings.get(name or "")
        mask = None if padding is None else self.editor.call(aten.ne.Scalar, padding, 0)
        marked = self._through_marks(
            mask, oldest(axis), axis, lambda slots: self.editor.call(aten.ne.Scalar, slots, -1)
        )
        if marked is not None or mask is None:
            return marked
        return self.align(mask, oldest(axis), axis, beside=True)

    def _through_marks(self, mask: Node | None, start: Dim, goal: Dim, those: Callable[[Node], Node]) -> Node | None:
        """Bring a mask from an axis to one that was cut from it, by marks among others.

        Args:
            those: which of some slots the mask may hold.

        Returns:
            None where no mark is between the two.
        """
        chain = _chain(resolve(start), resolve(goal)) or []
        if not any(slots_of(via) is not None for via in chain):
            return None
        for via in chain:
            if mask is not None:
                mask = self.editor.call(tokred.gather_tokens.default, mask, via, 1, 0)
            slots = slots_of(via)
            if slots is not None:
                own = those(slots)
                mask = own if mask is None else self.editor.call(aten.logical_and.default, mask, own)
        return mask

    def attention_mask(self, site: Attention) -> Node | None:
        """What an attention's queries see, broadcastable to [B, H, Tq, Tk]: bool or additive; None without a mask."""
        if site.padding is None:
            return site.mask
        mask = self.editor.call(aten.ne.Scalar, site.padding, 0)
        for dim in (1, 1):
            mask = self.editor.call(aten.unsqueeze.default, mask, dim)
        return mask

    def attention_sinks(self, site: Attention) -> list[Node]:
        """The sinks of an attention as a further argument, [B, H], if there are any: those of one row, as of all."""
        if site.sinks is None:
            return []
        row = self.editor.call(aten.select.int, site.sinks, 2, 0)
        return [self.editor.call(aten.select.int, row, -1, 0)]

    def mask_sources(self, among: str) -> list[Node]:
        """What the masks of tokens of a text are made of: the caller's padding, and where images stand."""
        splices = self.sites.splice.all if among != "all" and self.sites.splice is not None else []
        return [*self.sites.paddings.values(), *(each.mask for each in splices)]

    def marks(self, axis: Dim) -> list[Node]:
        """The slots of every mark that an axis was cut by, in order."""
        chain = _chain(oldest(axis), resolve(axis)) or []
        return [slots for via in chain if (slots := slots_of(via)) is not None]

    def inserted_tokens(self, axis: Dim) -> Length:
        """How many tokens of each row earlier edits put into a sequence."""
        total: Length = 0
        for via in _chain(oldest(axis), resolve(axis)) or ():
            if via.target is tokred.inserted_source.default:
                sizes = (self.editor.size(n, 1) for n in (via, via.args[1]))
                total = self.editor.arithmetic(lambda so_far, new, old: so_far + new - old, total, *sizes)
        return total

    def leads(self, start: Dim, goal: Dim) -> bool:
        """Whether an axis is another, or was cut from it."""
        return _chain(resolve(start), resolve(goal)) is not None

    def align(self, value: Node, start: Dim, goal: Dim, fill: float | None = None, *, beside: bool = False) -> Node:
        """Bring a value [B, T] from one axis to another that was cut from it, or that is a segment of it.

        Args:
            fill: what tokens have that the value says nothing of; tokens that a rule put in have 0 where none is given,
            beside: or what the old token beside them has.
        """
        start, goal = resolve(start), resolve(goal)
        if start == goal:
            return value
        part = _segment_bounds(start, goal) or _slice_bounds(start, goal)
        if part is not None:
            return self.editor.call(aten.slice.Tensor, value, 1, *part)
        chain = _chain(start, goal)
        if chain is not None:
            for via in chain:
                value = self.editor.call(tokred.gather_tokens.default, value, via, 1, 0)
                if via.target is tokred.inserted_source.default and not beside:
                    value = self.editor.call(aten.masked_fill.Scalar, value, via.args[0], fill or 0)
            return value
        whole = self._among_class_tokens(value, start, goal, fill)
        if whole is None:
            whole = self._through_splice(value, start, goal, fill)
        if whole is not None:
            return whole
        raise EditError(
            "scores of one sequence cannot be used for another",
            found=f"{_spelled(start)} tokens against {_spelled(goal)}",
            remedy="score and drop the same tokens",
        )

    def segment_bounds(self, axis: Dim, part: Dim) -> tuple[int, int]:
        """Where the patches among class tokens begin and end."""
        bounds = _segment_bounds(resolve(axis), resolve(part))
        assert bounds is not None
        return bounds

    def patch_mask(self, like: Node, axis: Dim) -> tuple[Node, int] | None:
        """The patches of a vision sequence that was cut from one of class tokens and patches.

        Args:
            like: [B, T] on the axis.

        Returns:
            bool [B, T], and the number of class tokens, none of which is ever cut; None when there are none.
        """
        start = oldest(axis)
        if not _has_segments(start) or start == resolve(axis):
            return None
        patches = longest_segment(start)
        inside = self.editor.call(
            aten.new_full.default, like, [self.editor.size(like, 0), _static(product(patches))], True, dtype=torch.bool
        )
        whole = self._among_class_tokens(inside, patches, start, fill=False)
        others = _static(product(start)) - _static(product(patches))
        return self.align(whole, start, axis), others

    def _among_class_tokens(self, value: Node, start: Dim, goal: Dim, fill: Any) -> Node | None:
        """From patches to the sequence that joins them with class tokens, which get the fill value."""
        whole = oldest(goal)
        if fill is None or not _has_segments(whole):
            return None
        segments = [resolve(s) for s in whole[0].segments]
        if segments.count(start) != 1:
            return None
        rows = self.editor.size(value, 0)
        parts = [
            value
            if segment == start
            else self.editor.call(aten.new_full.default, value, [rows, _static(product(segment))], fill)
            for segment in segments
        ]
        return self.align(self.editor.call(aten.cat.default, parts, 1), whole, goal)

    def _through_splice(self, value: Node, start: Dim, goal: Dim, fill: float | None) -> Node | None:
        """From image features to the text sequence that they are spliced into."""
        splice = self.sites.splice
        if splice is None or fill is None:
            return None
        axes = self.program.axes
        features = axes.of(splice.features)
        image = next((d for d in features if d[-len(start) :] == start), None)
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


def longest_segment(axis: Dim) -> Dim:
    """The patches of a concatenation of class tokens, register tokens and patches."""
    return max((resolve(s) for s in axis[0].segments or ()), key=lambda s: _order(product(s)))


def class_tokens(program: Program, sites: Sites) -> int | None:
    """How many tokens of the vision stack are no patches; None without such a stack, or where that is not known."""
    stack = sites.stacks.get("vision")
    dims = program.axes.of(stack.blocks[stack.features].output) if stack is not None else []
    if len(dims) != 3:
        return None
    start = oldest(dims[1])
    if not _has_segments(start):
        return 0
    others = product(start) - product(longest_segment(start))
    return others if isinstance(others, int) else None


def _spelled(axis: Dim) -> str:
    return " x ".join(str(atom.size) for atom in axis) or "1"


def _order(size: Any) -> int:
    return size if isinstance(size, int) else 2**31


def _has_segments(axis: Dim) -> bool:
    return len(axis) == 1 and bool(axis[0].segments)


def _static(size: Any) -> int:
    if isinstance(size, int):
        return size
    raise EditError(
        "the number of image tokens is not known when the graph is compiled",
        found=str(size),
        remedy="compile with a static image size",
    )


def _segment_bounds(start: Dim, goal: Dim) -> tuple[int, int] | None:
    """Where `goal` begins and ends within the concatenation `start`."""
    if not _has_segments(start):
        return None
    offset: Any = 0
    for segment in map(resolve, start[0].segments or ()):
        size = product(segment)
        if segment == goal and isinstance(offset, int) and isinstance(size, int):
            return offset, offset + size
        offset = offset + size
    return None


def _slice_bounds(start: Dim, goal: Dim) -> tuple[int, int] | None:
    """Where `goal` begins and ends when the model slices it from `start`."""
    if len(start) != 1 or len(goal) != 1:
        return None
    for (first, end), atom in start[0].slices.items():
        if atom.root() is goal[0] and isinstance(first, int) and isinstance(end, int | None):
            return first, MAX if end is None else end
    return None


def _inner_segment(start: Dim, features: list[Dim]) -> Dim | None:
    """The segment of a concatenation (CLS and patches) that image features are made of."""
    if len(start) != 1 or start[0].segments is None:
        return None
    for segment in map(resolve, start[0].segments):
        if segment and any(d[-len(segment) :] == segment for d in features):
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
