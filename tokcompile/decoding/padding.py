"""Which cached keys are padding, in a graph that continues a pruned prompt.

Padding stands on the left. A rule that drops image tokens leaves it there, and the first columns of the caller's mask
still tell. A rule that chooses among all tokens drops padding before it drops any real token: then a row holds as much
padding as its cache is longer than the number of real tokens that the caller's mask counts. Tokens that a rule inserted
among padding are hidden with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.decoding.carried import padding_name, take
from tokcompile.editing.edit import Editor, add
from tokcompile.editing.positions import recompute
from tokcompile.errors import CaptureError
from tokcompile.expr import substitute
from tokcompile.program import Program
from tokcompile.rulefile import Rule
from tokcompile.sites import Attention, Block, Sites
from tokcompile.steps import Drop, Evict, Insert, Merge, Select
from tokcompile.steps.insert import period_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A drop as a decode graph sees it.

    Attributes:
        first: the first decoder block whose cache it shortened.
        takes_padding: whether it drops padding, before any real token; else it drops none.
        place: rule file and line.
        inserts: the step that put tokens in, where it is no drop.
        alone: whether it shortened the cache of `first` alone, and of no later block.
        joint: whether what heads kept of it together says itself which of its slots hold padding.
    """

    first: int
    takes_padding: bool
    place: str
    inserts: Insert | None = None
    alone: bool = False
    joint: bool = False

    def shortens(self, block: int) -> bool:
        """Whether the cache of a block is other than the model made it."""
        return self.first == block if self.alone else self.first <= block


def takes_padding(rule: Rule, step: Drop | Merge | Evict, known: Mapping[str, object]) -> bool:
    """Whether the tokens that a drop chooses from are all of a row, or its text: padding is among these.

    A merge of features is of images alone.
    """
    if isinstance(step, Merge):
        return False
    choices = {s.name: s for s in rule.steps if isinstance(s, Select)}
    choice = choices[step.keep]
    while choice.of is not None:
        choice = choices[choice.of]
    return choice.by == "protect" or str(substitute(choice.among, known)) != "image"


def follow_padding(program: Program, sites: Sites, cuts: list[Cut], editor: Editor, stop: int | None = None) -> None:
    """Let every attention of a decode graph mask the padding that is left in its cache.

    Args:
        cuts: the drops of all rules.
        stop: the first block that is left alone, since its cache says itself what it holds.

    Raises:
        CaptureError: drops of both kinds shortened one cache, so that nobody knows what they left.
    """
    if sites.padding is None:
        return
    made: dict[int, Node] = {}
    masks: dict[tuple[Node, int], Node] = {}
    for index, block in enumerate(sites.stacks["decoder"].blocks[:stop]):
        here = [cut for cut in cuts if cut.shortens(index)]
        if not any(cut.takes_padding or cut.inserts for cut in here) or block not in sites.caches:
            continue  # blocks without a cache attend to images alone
        if any(cut.joint for cut in here) and not any(cut.inserts for cut in here):
            _swap(editor, sites, block, _of_step(editor, sites.padding, block, sites.caches[block].past), masks, index)
            continue
        mixed = any(cut.takes_padding for cut in here) and not all(cut.takes_padding for cut in here)
        if mixed and any(cut.alone for cut in here) and not any(cut.inserts for cut in here):
            left = _told(editor, sites.padding, block, sites.caches[block].past, index)
            _swap(editor, sites, block, left, masks, index)
            continue
        if mixed:
            raise CaptureError(
                "one drop took padding before another that takes none: what is left of it is not known",
                where=[cut.place for cut in here],
                found="left padding, under rules of both kinds",
                remedy="choose among image tokens in all rules, or in none, and insert no tokens",
            )
        key = max(cut.first for cut in here)
        if key not in made:
            inserts = [cut.inserts for cut in here if cut.inserts is not None]
            made[key] = _left(editor, sites, sites.padding, block, inserts)
        _swap(editor, sites, block, made[key], masks, key)
    program.changed()


def _left(editor: Editor, sites: Sites, padding: Node, block: Block, inserts: list[Insert]) -> Node:
    """A mask of a block's keys with as many zeros in front as its cache holds padding, or tokens inserted among it."""
    past = sites.caches[block].past
    sources = [padding, block.input, past]
    with editor.after(sources):
        keys = editor.arithmetic(add, editor.size(past, 2), editor.size(block.input, 1))
        real = editor.call(aten.ne.Scalar, padding, 0)
        count = editor.call(aten.sum.dim_IntList, real, [1], True)
        whole = editor.size(padding, 1) if inserts else keys
        spare = editor.call(aten.sub.Tensor, editor.call(aten.full_like.default, count, whole), count)
        if inserts:
            _require_left(editor, padding)
        for step in inserts:
            spare = editor.call(aten.add.Tensor, spare, _among_padding(editor, step, spare))
        columns = keys if inserts else editor.size(padding, 1)
        columns = editor.call(aten.arange.default, columns, device=padding.meta["val"].device)
        seen = editor.call(aten.ge.Tensor, columns, spare)
        return editor.call(aten.to.dtype, seen, padding.meta["val"].dtype)


def _told(editor: Editor, padding: Node, block: Block, past: Node, index: int) -> Node:
    """A mask of a block's keys with zeros in front for the padding that the prompt's graph said its cache holds."""
    count = told(editor, padding, padding_name(index), "how much padding each cache holds")
    with editor.after([padding, block.input, past, count]):
        keys = editor.arithmetic(add, editor.size(past, 2), editor.size(block.input, 1))
        columns = editor.call(aten.arange.default, keys, device=padding.meta["val"].device)
        seen = editor.call(aten.ge.Tensor, columns, editor.call(aten.unsqueeze.default, count, 1))
        return editor.call(aten.to.dtype, seen, padding.meta["val"].dtype)


def _of_step(editor: Editor, padding: Node, block: Block, past: Node) -> Node:
    """A mask of a block's keys, whose last columns are those that the caller gives for this step, and others ones."""
    with editor.after([padding, block.input, past]):
        rows, held = (editor.size(past, dim) for dim in (0, 2))
        new = editor.arithmetic(lambda tokens: -tokens, editor.size(block.input, 1))
        ones = editor.call(aten.new_ones.default, padding, [rows, held])
        return editor.call(aten.cat.default, [ones, editor.call(aten.slice.Tensor, padding, 1, new, MAX)], 1)


def told(editor: Editor, like: Node, name: str, what: str) -> Node:
    """A number for each row, int64 [B], that the prompt's graph handed on; `like` is [B, ...]."""
    with editor.program.fake_mode:
        value = like.meta["val"].new_empty(like.meta["val"].shape[0], dtype=torch.int64)
    return take(editor.program, name, value, what)


def _require_left(editor: Editor, padding: Node) -> None:
    """Check when the graph runs that what pads a row stands on its left."""
    real = editor.call(aten.ne.Scalar, padding, 0)
    before, after = (editor.call(aten.slice.Tensor, real, 1, *ends) for ends in ((0, -1), (1, MAX)))
    ordered = editor.call(aten.ge.Tensor, after, before)
    editor.require(ordered, "a step after a prompt that tokens were put into needs padding on the left")


def _among_padding(editor: Editor, step: Insert, padded: Node) -> Node:
    """int64 [B, 1]: how many tokens of a step stand among what pads a row, int64 [B, 1] tokens, and are hidden too."""
    call, kind = editor.call, step.where.partition(":")[0]
    none = call(aten.zeros_like.default, padded)
    if kind in ("front", "end", "patches"):
        return none
    if kind == "listed":
        for before in step.places or ():
            here = call(aten.ge.Scalar, padded, max(before, 1))
            none = call(aten.add.Tensor, none, here)
        return none
    period = period_of(step) if kind == "every" else None
    if period is not None:
        count = 1 if step.count is None else int(step.count)
        return call(aten.mul.Scalar, call(aten.floor_divide.Scalar, padded, period), count)
    if kind == "random":
        editor.require(
            call(aten.eq.Scalar, padded, 0),
            "a step after a padded prompt that tokens were put into at random places cannot tell which stand among "
            "padding: use where: every",
        )
    return none


def _swap(
    editor: Editor, sites: Sites, block: Block, left: Node, masks: dict[tuple[Node, int], Node], key: int
) -> None:
    site, padding = block.attention, sites.padding
    old = site.padding if site.padding is not None else site.mask
    if old is None or padding is None:
        return
    readers = [user for user in old.users if _reads(user, site, editor, sites)]
    if readers and (old, key) not in masks:
        with editor.before(min(readers, key=sites.reach.order.__getitem__)):
            masks[old, key] = left if old is padding else recompute(editor, old, padding, {padding: left})
    for user in readers:
        editor.swap_input(user, old, masks[old, key])


def _reads(user: Node, site: Attention, editor: Editor, sites: Sites) -> bool:
    """Whether a user of a mask is this attention, or a part of it: other blocks read the same mask."""
    if user in editor.made or user not in sites.reach.order:
        return False
    return user is site.node or (sites.reach.above(user, site.node) and sites.reach.above(site.query, user))
