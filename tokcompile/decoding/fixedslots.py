"""A graph that goes on from buffers of a fixed size: each query sees the slots of its block that hold tokens.

Where a step's keys are put into a buffer, the graph itself computes; up to there it holds tokens. Blocks may hold
different numbers of them, so that each has a mask of its own. Padding stands in front: how much there is of it the
prompt's call has handed on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from tokcompile.binding import RuleInstance
from tokcompile.decoding.carried import LEFT, REMEDY, SHORT, SPARE, padding_name, take
from tokcompile.decoding.padding import Cut, told
from tokcompile.decoding.placetables import is_biased
from tokcompile.editing.edit import Editor
from tokcompile.errors import CaptureError, TokredError
from tokcompile.expr import has_expression, substitute
from tokcompile.passes.jointheads import is_joint
from tokcompile.program import Program, place
from tokcompile.rulefile import Rule
from tokcompile.sites import Block, Sites, window_of
from tokcompile.sites.attention import Attention, softmax_of
from tokcompile.sites.concrete import evaluate
from tokcompile.steps import Drop, Evict, Insert, Layer, Mark, Merge, Place, Rotate, Route, Step

aten = torch.ops.aten
_OTHERS = (Mark, Place, Rotate, Route, Layer)


def check_rules(rules: Sequence[RuleInstance], windows: bool = False) -> None:
    """Refuse rules that a static cache does not go with.

    Args:
        windows: whether some layers of the model attend in a window.

    Raises:
        TokredError: a step that needs to know more of a cache than how much padding it holds.
    """
    for rule in rules:
        known = {k: v for k, v in rule.params.items() if not has_expression(v)}
        for step in rule.rule.steps:
            why = _refused(rule.rule, step, known, windows)
            if why is not None:
                raise TokredError(
                    "this rule does not go with a static cache",
                    where=[f"{rule.rule.path}:{step.line} ({step.verb})"],
                    found=why,
                    remedy="use transformers' DynamicCache",
                )


def _refused(rule: Rule, step: Step, known: Mapping[str, Any], windows: bool) -> str | None:
    def of(field: str) -> str:
        value = getattr(step, field)
        return str(substitute(value, known) if has_expression(value) else value)

    if isinstance(step, _OTHERS):
        return f"'{step.verb}', which has something to do in every step"
    if isinstance(step, Insert) and step.into_text and of("cached") != "False":
        return "tokens that are put into a text and cached"
    if isinstance(step, Evict) and of("when") != "prefill":
        return f"when: {of('when')}; with it the shapes of a DynamicCache stay the same, too"
    if isinstance(step, Evict) and is_joint(rule, step, known):
        return "heads: joint, which keeps unequal numbers of keys for the heads of a block"
    if isinstance(step, Drop | Merge) and not getattr(step, "of_caches", False):
        return "tokens that are dropped before layers with a window" if windows else None
    return None


def is_fixed(sites: Sites) -> bool:
    """Whether a graph goes on from buffers of a fixed size."""
    return any(cache.slots is not None for cache in sites.caches.values())


def follow_fixed(program: Program, sites: Sites, cuts: Sequence[Cut], editor: Editor) -> None:
    """Let every attention of a step see what its buffer holds, but for padding.

    Args:
        cuts: what rules took from the caches of the prompt.

    Raises:
        CaptureError: nobody told of the padding, or a block has no buffer.
    """
    blocks = sites.stacks["decoder"].blocks
    _check_told(program, sites)
    _check_positions(program, sites, blocks)
    for number, block in enumerate(blocks):
        cache = sites.caches.get(block)
        if window_of(block.attention, sites.reach) is not None:
            continue
        if cache is None or cache.slots is None:
            raise CaptureError(
                "a block of this step has no buffer of a fixed size, though others have",
                where=[place(block.attention.node)],
                remedy="use transformers' DynamicCache",
            )
        _check_mask(program, sites, block)
        padded = _padded(program, editor, cache.past, [c for c in cuts if c.shortens(number)], number, len(blocks))
        with editor.before(_entry(block.attention, sites)):
            seen = _seen(editor, cache.key, cache.slots, padded)
            _show(editor, sites, block.attention, seen)
    program.changed()


def _check_told(program: Program, sites: Sites) -> None:
    if program.carried is None:
        past = next(cache.past for cache in sites.caches.values() if cache.slots is not None)
        assert past is not None
        raise CaptureError(
            "this graph goes on from a cache of a fixed size, which does not say how many tokens it holds",
            where=[place(past)],
            found=f"{past.meta['val'].shape[2]} slots",
            remedy=f"{REMEDY}; or use transformers' DynamicCache",
        )


def _check_mask(program: Program, sites: Sites, block: Block) -> None:
    """Refuse a mask that says more than which keys are seen: it would be lost."""
    mask = block.attention.mask
    if mask is None or mask.meta["val"].dtype == torch.bool:
        return
    if is_biased(program, sites, block.attention) or evaluate(mask, sites.reach) is None:
        raise CaptureError(
            "an attention to a buffer of a fixed size adds more to its scores than a mask",
            where=[place(block.attention.node)],
            found="a bias, or values that are not known",
            remedy="use transformers' DynamicCache",
        )


def _check_positions(program: Program, sites: Sites, blocks: Sequence[Block]) -> None:
    """Refuse positions that are counted from how much of a buffer is filled."""
    slots = [cache.slots for cache in sites.caches.values() if cache.slots is not None]
    counters = [n for n in program.inputs() if any(sites.reach.above(n, put) for put in slots)]
    positions = [rotary.positions for rotary in sites.rotary["decoder"]]
    for node in [*positions, blocks[0].input]:
        if sites.reach.any_above(node, counters):
            raise CaptureError(
                "a rule shortened the prompt's caches, and this step counts its position from what they hold",
                where=[place(node)],
                remedy="pass position_ids (of the sequence as it was), as model.generate does where a model takes them",
            )


def _padded(program: Program, editor: Editor, past: Any, cuts: Sequence[Cut], number: int, layers: int) -> Node:
    """int64 [B], how much padding stands in front in a block's buffer."""
    taking = [cut.takes_padding for cut in cuts]
    what = "how much padding a static cache holds"
    if all(taking) and taking:
        every = _of_layers(program, past, layers, SPARE, what)
        with editor.after([every, past]):
            return editor.call(aten.select.int, every, 1, number)
    if not any(taking):
        return told(editor, past, LEFT, what)
    if any(cut.alone for cut in cuts):
        return told(editor, past, padding_name(number), what)
    raise CaptureError(
        "one drop took padding before another that takes none: what is left of it is not known",
        where=[cut.place for cut in cuts],
        remedy="choose among image tokens in all rules, or in none",
    )


def _of_layers(program: Program, like: Node, layers: int, name: str, what: str) -> Node:
    """Numbers of each layer's cache that the prompt's call handed on, int64 [B, layers]; `like` is [B, ...]."""
    with program.fake_mode:
        value = like.meta["val"].new_empty(like.meta["val"].shape[0], layers, dtype=torch.int64)
    return take(program, name, value, what)


def dropped_before(editor: Editor, sites: Sites, positions: Node, block: int) -> Node:
    """By how much a block's cache holds less than the prompt, of as many dimensions as positions; equal in all rows."""
    past, layers = next(c.past for c in sites.caches.values()), len(sites.stacks["decoder"].blocks)
    assert past is not None
    every = _of_layers(editor.program, past, layers, SHORT, "how many tokens of the prompt a static cache lacks")
    one = editor.call(aten.select.int, editor.call(aten.slice.Tensor, every, 0, 0, 1), 1, block)
    return editor.call(aten.view.default, one, [1] * positions.meta["val"].ndim)


def _seen(editor: Editor, key: Node, slots: Node, padded: Node) -> Node:
    """bool [B, 1, Tq, N]: the slots up to each query's own, but for padding."""
    call = editor.call
    columns = call(aten.arange.default, editor.size(key, 2), device=slots.meta["val"].device)
    past = call(aten.le.Tensor, columns, call(aten.unsqueeze.default, slots, 1))
    real = call(aten.ge.Tensor, columns, call(aten.unsqueeze.default, padded, 1))
    for _ in range(2):
        real = call(aten.unsqueeze.default, real, 1)
    return call(aten.logical_and.default, past, real)


def _inside(user: Node, site: Attention, sites: Sites) -> bool:
    return user in sites.reach.order and sites.reach.above(user, site.node) and sites.reach.above(site.query, user)


def _readers(site: Attention, sites: Sites) -> list[Node]:
    """What reads a mask within an attention that is written out."""
    return [user for user in site.mask.users if _inside(user, site, sites)] if site.mask is not None else []


def _entry(site: Attention, sites: Sites) -> Node:
    """The first node of an attention that may read a mask."""
    return min([site.node, *_readers(site, sites)], key=lambda n: n._sort_key)


def _show(editor: Editor, sites: Sites, site: Attention, seen: Node) -> None:
    """Let an attention see some keys and no others, whatever mask it had."""
    node = site.node
    if node.target is aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        editor.set_args(node, [*node.args[:3], seen, dropout, False])
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    elif site.padding is not None:
        made = editor.call(
            torch.ops.tokred.attend.default, site.query, site.key, site.value, seen, site.scale, site.softcap, None
        )
        editor.replace(node, made)
    else:
        _show_written_out(editor, sites, site, seen)


def _show_written_out(editor: Editor, sites: Sites, site: Attention, seen: Node) -> None:
    readers = _readers(site, sites)
    if softmax_of(site) is None or site.partial or not readers:
        raise CaptureError(
            "an attention to a buffer of a fixed size takes no mask of its own",
            where=[place(site.node)],
            found="scores without a mask, or with several",
            remedy="load the model with attn_implementation='sdpa', or use transformers' DynamicCache",
        )
    old = site.mask
    assert old is not None
    mask = seen
    if old.meta["val"].dtype != torch.bool:
        like = {"dtype": old.meta["val"].dtype, "device": old.meta["val"].device}
        shown, hidden = (
            editor.call(aten.full.default, [], value, **like) for value in (0.0, torch.finfo(like["dtype"]).min)
        )
        mask = editor.call(aten.where.self, seen, shown, hidden)
    for user in readers:
        editor.swap_input(user, old, mask)
