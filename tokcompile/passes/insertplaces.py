"""Where tokens are put into a sequence: the places of an insert step in the longer one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.budget import round_ratio
from tokcompile.editing.edit import Length, add
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, longest_segment, oldest
from tokcompile.passes.select import is_text_axis
from tokcompile.sites.features import Sequence
from tokcompile.steps import Insert
from tokcompile.steps.insert import period_of

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class Slots:
    """The places of inserted tokens.

    Attributes:
        fresh: bool [B, T']; None where nothing is inserted.
        new: T'.
        count: how many are inserted.
        first: int64 [B], the first real token of each row; None where it is the first.
        run: the place of the first inserted token and how many follow it, where that is one place for all rows.
    """

    fresh: Node | None
    new: Length
    count: Length
    first: Node | None = None
    run: tuple[Length, int] | None = None


@dataclass(frozen=True, eq=False)
class _Asked:
    """What a way to choose places is given: rows [B] by `like` [B, T], T, and the real tokens, bool [B, T]."""

    ctx: Context
    step: Insert
    like: Node
    at: Sequence
    old: Length
    valid: Node | None

    @property
    def count(self) -> int:
        """The step's count, once its expressions have their values."""
        return 1 if self.step.count is None else int(self.step.count)

    def index(self, new: Length) -> Node:
        """int64 [T']."""
        return self.ctx.editor.call(aten.arange.default, new, device=self.like.meta["val"].device)

    def rows(self, flags: Node, new: Length) -> Node:
        """bool [B, T'] of flags [T'] or [B, T']."""
        return self.ctx.editor.call(aten.expand.default, flags, [self.ctx.editor.size(self.like, 0), new])

    def plus(self, more: Length) -> Length:
        """T'."""
        return self.ctx.editor.arithmetic(add, self.old, more)


def find_slots(ctx: Context, step: Insert, node: Node, at: Sequence, old: Length, valid: Node | None) -> Slots:
    """Choose the places of a step's tokens in a sequence [B, T, C].

    Raises:
        EditError: they cannot be told for this sequence.
    """
    like = ctx.editor.call(aten.select.int, node, -1, 0)
    asked = _Asked(ctx, step, like, at, old, valid)
    kind = step.where.partition(":")[0]
    slots = WAYS[kind](asked)
    return Slots(None, old, 0) if isinstance(slots.count, int) and slots.count == 0 else slots


def _run(asked: _Asked, start: Length | Node, known: bool, first: Node | None = None) -> Slots:
    """Tokens together at one place: a number, or int64 [B]."""
    call, new = asked.ctx.editor.call, asked.plus(asked.count)
    index = asked.index(new)
    if not known:
        start = call(aten.unsqueeze.default, start, 1)
    least, less = (aten.ge, aten.lt)
    kind = "Scalar" if known else "Tensor"
    after = call(getattr(least, kind), index, start)
    stop = asked.ctx.editor.arithmetic(add, start, asked.count) if known else call(aten.add.Tensor, start, asked.count)
    before = call(getattr(less, kind), index, stop)
    fresh = asked.rows(call(aten.logical_and.default, after, before), new)
    return Slots(fresh, new, asked.count, first, (start, asked.count) if known else None)


def _front(asked: _Asked) -> Slots:
    """In front of all real tokens: behind what pads a row on the left."""
    if asked.valid is None:
        return _run(asked, 0, known=True)
    first = _first(asked)
    return _run(asked, first, known=False, first=first)


def _end(asked: _Asked) -> Slots:
    """Behind the last real token: in front of what pads a row on the right."""
    if asked.valid is None:
        return _run(asked, asked.old, known=True)
    last = asked.ctx.editor.call(tokred.last_valid.default, asked.valid)
    behind = asked.ctx.editor.call(aten.add.Tensor, last, 1)
    return _run(asked, behind, known=False, first=_first(asked))


def _patches(asked: _Asked) -> Slots:
    """Between class and register tokens and the patches."""
    if is_text_axis(asked.ctx, asked.at.axis):
        raise EditError(
            "there are no patches to insert tokens in front of",
            where=[asked.step.at],
            found="a sequence of text",
            remedy="`where: front`",
        )
    leading = leading_tokens(asked.at.axis) or 0
    return _run(asked, leading, known=True)


def _every(asked: _Asked) -> Slots:
    """After each N tokens, those that pad a row among them."""
    editor, count, period = asked.ctx.editor, asked.count, period_of(asked.step)
    if period is None:
        return Slots(None, asked.old, 0)
    total = editor.arithmetic(lambda n: n // period * count, asked.old)
    new = asked.plus(total)
    inside = editor.call(aten.remainder.Scalar, asked.index(new), period + count)
    fresh = editor.call(aten.ge.Scalar, inside, period)
    return Slots(asked.rows(fresh, new), new, total)


def _random(asked: _Asked) -> Slots:
    """At places of the longer sequence that a seed chooses, none twice, the same in each row."""
    editor, share = asked.ctx.editor, asked.step.share
    count: Length = asked.count
    if share is not None:
        exact = Fraction(share)
        count = editor.arithmetic(lambda n: round_ratio(n * exact.numerator, exact.denominator, "half_even"), asked.old)
    new = asked.plus(count)
    longer = editor.call(aten.new_zeros.default, asked.like, [editor.size(asked.like, 0), new])
    scores = editor.call(tokred.random_scores.default, longer, int(asked.step.seed))
    return Slots(editor.call(tokred.topk_mask.default, scores, None, count), new, count)


def _listed(asked: _Asked) -> Slots:
    """Behind as many old tokens as a list says."""
    places = asked.step.places or ()
    if not isinstance(asked.old, int) or places[-1] > asked.old:
        raise EditError(
            "tokens are inserted at places that this sequence does not have",
            where=[asked.step.at],
            found=f"place {places[-1]} of {asked.old if isinstance(asked.old, int) else 'a symbolic number of'} tokens",
            remedy="compile with a static length, and give places from 0 to the number of tokens",
        )
    call, new = asked.ctx.editor.call, asked.plus(len(places))
    index, fresh = asked.index(new), None
    for number, before in enumerate(places):
        here = call(aten.eq.Scalar, index, before + number)
        fresh = here if fresh is None else call(aten.logical_or.default, fresh, here)
    return Slots(asked.rows(fresh, new), new, len(places))


WAYS: dict[str, Callable[[_Asked], Slots]] = {
    "front": _front,
    "end": _end,
    "patches": _patches,
    "every": _every,
    "random": _random,
    "listed": _listed,
}


def _first(asked: _Asked) -> Node:
    """int64 [B]: the first real token of each row."""
    real = asked.ctx.editor.call(aten.to.dtype, asked.valid, torch.int64)
    return asked.ctx.editor.call(aten.argmax.default, real, 1)


def leading_tokens(axis: Dim) -> int | None:
    """Class and register tokens in front of the patches; None for a sequence that joins nothing."""
    start = oldest(axis)
    if len(start) != 1 or not start[0].segments:
        return None
    segments = [resolve(s) for s in start[0].segments]
    sizes: list[Any] = [product(s) for s in segments[: segments.index(longest_segment(start))]]
    return sum(sizes) if all(isinstance(size, int) for size in sizes) else None
