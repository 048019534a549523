"""Which cached keys are padding, in a graph that continues a pruned prompt.

Padding stands on the left. A rule that drops image tokens leaves it there, and the first columns of the caller's mask
still tell. A rule that chooses among all tokens drops padding before it drops any real token: then a row holds as much
padding as its cache is longer than the number of real tokens that the caller's mask counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.edit import Editor, add
from tokcompile.errors import CaptureError
from tokcompile.expr import substitute
from tokcompile.positions import recompute
from tokcompile.program import Program
from tokcompile.rulefile import Rule
from tokcompile.sites import Block, Sites
from tokcompile.steps import Drop, Merge, Select

aten = torch.ops.aten


@dataclass(frozen=True)
class Cut:
    """A drop as a decode graph sees it.

    Attributes:
        first: the first decoder block whose cache it shortened.
        takes_padding: whether it drops padding, before any real token; else it drops none.
        place: rule file and line.
    """

    first: int
    takes_padding: bool
    place: str


def takes_padding(rule: Rule, step: Drop | Merge, known: Mapping[str, object]) -> bool:
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
        here = [cut for cut in cuts if cut.first <= index]
        if not any(cut.takes_padding for cut in here) or block not in sites.caches:  # which attends to images alone
            continue
        if not all(cut.takes_padding for cut in here):
            raise CaptureError(
                "one drop took padding before another that takes none: what is left of it is not known",
                where=[cut.place for cut in here],
                found="left padding, under rules of both kinds",
                remedy="choose among image tokens in all rules, or in none",
            )
        key = max(cut.first for cut in here)
        if key not in made:
            made[key] = _left(editor, sites, sites.padding, block)
        _swap(editor, sites, block, made[key], masks, key)
    program.changed()


def _left(editor: Editor, sites: Sites, padding: Node, block: Block) -> Node:
    """The caller's mask with as many zeros in front as a block's cache holds padding."""
    past = sites.caches[block].past
    sources = [padding, block.input, past]
    with editor.after(sources):
        keys = editor.arithmetic(add, editor.size(past, 2), editor.size(block.input, 1))
        real = editor.call(aten.ne.Scalar, padding, 0)
        count = editor.call(aten.sum.dim_IntList, real, [1], True)
        spare = editor.call(aten.sub.Tensor, editor.call(aten.full_like.default, count, keys), count)
        columns = editor.call(aten.arange.default, editor.size(padding, 1), device=padding.meta["val"].device)
        seen = editor.call(aten.ge.Tensor, columns, spare)
        return editor.call(aten.to.dtype, seen, padding.meta["val"].dtype)


def _swap(
    editor: Editor, sites: Sites, block: Block, left: Node, masks: dict[tuple[Node, int], Node], key: int
) -> None:
    site, padding = block.attention, sites.padding
    old = site.padding if site.padding is not None else site.mask
    if old is None or padding is None:
        return
    if (old, key) not in masks:
        with editor.before(site.node):
            masks[old, key] = left if old is padding else recompute(editor, old, padding, {padding: left})
    for user in list(old.users):
        if user in editor.made or user not in sites.reach.order:
            continue
        inside = sites.reach.above(user, site.node) and sites.reach.above(site.query, user)
        if user is site.node or inside:  # other blocks read the same mask
            editor.swap_input(user, old, masks[old, key])
