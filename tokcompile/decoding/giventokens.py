"""A rule's own tokens in a step after the prompt: its caller gives them, as rows of `inputs_embeds`.

A rule chooses places in the prompt alone. Later its learned tokens come where the caller wants them: a row of a step's
`inputs_embeds` that equals one of the vectors in every number is such a token. That is decided when the graph runs, so
rows of a batch may differ. A step whose input are token ids has none, and none of this in its graph.

The caller counts such a token like any other: a column of the mask, a position. Those positions that its rule does not
count are taken out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch.fx import Node

from tokcompile.address import parse_address
from tokcompile.applied import Applied
from tokcompile.binding import RuleInstance
from tokcompile.decoding.carried import REMEDY, given_name, hand_on
from tokcompile.decoding.decode import region_of, renumber
from tokcompile.decoding.padding import told
from tokcompile.editing.edit import Editor
from tokcompile.errors import CaptureError
from tokcompile.passes.insert import learned_tokens
from tokcompile.passes.insertplaces import Slots
from tokcompile.program import Program, place
from tokcompile.sites import Sites, find_sites, resolve_address
from tokcompile.sites.rotary import Rotary
from tokcompile.steps import Evict, Insert, Layer, Place, Rotate

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class _Given:
    """The tokens of one insert step in a later step.

    Attributes:
        flags: bool [B, T], which tokens are these; None where the caller gives token ids.
        before: int64 [B], how many each row was given in earlier steps; None where positions count them.
    """

    step: Insert
    rule: str
    flags: Node | None
    before: Node | None


def inserts_of(rule: RuleInstance) -> list[Insert]:
    """The insert steps of a rule that put tokens into a text."""
    return [step for step in rule.rule.steps if isinstance(step, Insert) and step.into_text]


def follow_given(
    program: Program, rules: Sequence[RuleInstance], facts: Mapping[str, int], applied: Sequence[Applied]
) -> list[dict[str, Slots]]:
    """Let a step after a prompt treat what it is given of a rule's tokens as the prompt treats them.

    Returns:
        For each rule its tokens in this step, by the name of the insert step; none where the caller gives token ids.

    Raises:
        TokredError: positions of this step cannot tell these tokens apart; it names rule file and line.
    """
    found: list[dict[str, Slots]] = [{} for _ in rules]
    sites, given = find_sites(program), []
    embedded = _embedded(program, sites)
    for rule, record, slots in zip(rules, applied, found, strict=True):
        editor = Editor(program, rule.name, record.counts)
        for step in rule.resolve_only(inserts_of(rule), facts):
            if step.content != "learned":
                continue
            each = _given(editor, sites, rule, rules, step, facts, embedded)
            given.append(each)
            if each.flags is not None:
                count = editor.size(embedded, 1)
                slots[step.name] = Slots(each.flags, count, count)
                record.steps.append({"verb": "insert", "at": step.at, "name": step.name, "given": "in inputs_embeds"})
    if embedded is not None:
        _keep_vectors(program, sites, embedded, [each for each in given if each.flags is not None])
        program.changed()
        sites = find_sites(program)
    for rotary in sites.rotary.get("decoder", []):
        _place(Editor(program, rules[0].name, applied[0].counts), rotary, given)
    _hand_on(program, given)
    program.changed()
    return found


def _embedded(program: Program, sites: Sites) -> Node | None:
    """The caller's own embeddings, [B, T, C]; None where the graph looks them up."""
    first = sites.stacks["decoder"].blocks[0].input
    axes, width = program.axes, first.meta["val"].shape[-1]
    found = [
        node
        for node in program.inputs()
        if node.meta["val"].dtype.is_floating_point
        and node.meta["val"].ndim == 3
        and node.meta["val"].shape[-1] == width
        and sites.reach.above(node, first)
        and axes.of(node)[1] == axes.of(first)[1]
    ]
    return found[0] if len(found) == 1 else None


def _given(
    editor: Editor,
    sites: Sites,
    rule: RuleInstance,
    rules: Sequence[RuleInstance],
    step: Insert,
    facts: Mapping[str, int],
    embedded: Node | None,
) -> _Given:
    program, first = editor.program, sites.stacks["decoder"].blocks[0].input
    flags = None if embedded is None else _flags(editor, step, embedded)
    why = _why_not(program, sites, rule, rules, step, facts, embedded)
    if why and flags is not None:
        with editor.after([flags]):
            none = editor.call(aten.logical_not.default, flags)
            editor.require(none, f"a step cannot be given tokens '{step.name}' of rule '{rule.name}': {why}")
    if why:
        return _Given(step, rule.name, None, None)
    before = None
    if step.positions == "keep":
        before = told(editor, first, given_name(rule.name, step.name), f"how many '{step.name}' each row was given")
    return _Given(step, rule.name, flags, before)


def _flags(editor: Editor, step: Insert, embedded: Node) -> Node | None:
    """bool [B, T]: tokens that equal one of the vectors; None as long as nobody knows how many vectors there are."""
    held = editor.program.weights.held(editor.rule, step.name)
    count = 1 if step.shared else None if held is None else int(held.shape[0])
    if count is None:
        return None
    vectors = learned_tokens(editor, step, count, embedded.meta["val"])
    with editor.after([embedded]):
        return editor.call(tokred.matching_tokens.default, embedded, vectors)


def _why_not(
    program: Program,
    sites: Sites,
    rule: RuleInstance,
    rules: Sequence[RuleInstance],
    step: Insert,
    facts: Mapping[str, int],
    embedded: Node | None,
) -> str:
    """Why a step cannot be given a token of an insert step; "" where it can."""
    first = sites.stacks["decoder"].blocks[0].input
    at = parse_address(step.at)
    if at.stack == "decoder" and resolve_address(sites, step.at).node is not first:
        return f"earlier blocks than {step.at} have none in their caches"
    if at.stack != "decoder" and embedded is not None and embedded is not first:
        return f"the model changes embeddings behind {step.at}, so insert at decoder.0.input"
    if not sites.rotary.get("decoder"):
        return "positions of this model come from a table, not from a rotation"
    others = [s for each in rules for s in each.rule.steps if isinstance(s, Place | Rotate)]
    if any(isinstance(other, Place) or other.by != "base" for other in others):
        return "another rule gives positions of its own to tokens"
    evictions = [s for each in rules for s in each.rule.steps if isinstance(s, Evict)]
    if any(evict.when != "prefill" or evict.positions != "keep" for evict in evictions):
        return "another rule evicts keys at later steps, or numbers them anew"
    if program.carried is None and (step.positions == "keep" or _attends(rule, step, facts)):
        return f"nobody keeps what it needs of the prompt: {REMEDY}"
    return ""


def _attends(rule: RuleInstance, step: Insert, facts: Mapping[str, int]) -> bool:
    """Whether the tokens of a step attend to each other by a layer of their own."""
    layers = [s for s in rule.rule.steps if isinstance(s, Layer) and s.of == step.name]
    return any(layer.blocks is None or int(layer.blocks) > 0 for layer in rule.resolve_only(layers, facts))


def _keep_vectors(program: Program, sites: Sites, embedded: Node, given: Sequence[_Given]) -> None:
    """Let the first block read the vectors themselves, where a model scales embeddings: the prompt's are not scaled."""
    first = sites.stacks["decoder"].blocks[0].input
    if embedded is first:
        return
    for each in given:
        editor = Editor(program, each.rule)
        users = list(first.users)
        with editor.after([first, each.flags]):
            flags = editor.call(aten.unsqueeze.default, each.flags, -1)
            own = editor.call(aten.to.dtype, embedded, first.meta["val"].dtype)
            kept = editor.call(aten.where.self, flags, own, first)
        for user in users:
            editor.swap_input(user, first, kept)
        first = kept


def _place(editor: Editor, rotary: Rotary, given: Sequence[_Given]) -> None:
    """Give the tokens of this step the positions that the rules mean, where these are not the caller's."""
    sites, positions = find_sites(editor.program), rotary.positions
    first = sites.stacks["decoder"].blocks[0].input
    region = region_of(editor.program, sites, first)
    silent = [each.flags for each in given if each.flags is not None and each.step.fresh == "none"]
    counts = [each for each in given if each.before is not None]
    if not silent and not counts:
        return
    call = editor.call
    with editor.after([positions, *silent, *(each.before for each in counts)]):
        made = positions
        for each in counts:
            made = call(aten.sub.Tensor, made, _beside(editor, first, positions, _earlier(editor, each)))
        if silent:
            flags = reduce(lambda one, other: call(aten.logical_or.default, one, other), silent)
            flags = _beside(editor, first, positions, flags)
            made = call(aten.where.self, flags, call(aten.zeros_like.default, made), made)
    renumber(editor, sites, region, positions, made, rotary.tables)
    editor.program.changed()


def _earlier(editor: Editor, each: _Given) -> Node:
    """int64 [B, T] or [B, 1]: how many tokens of an insert step each token has before it that are no prompt's."""
    call = editor.call
    before = call(aten.unsqueeze.default, each.before, 1)
    if each.flags is None:
        return before
    own = call(aten.to.dtype, each.flags, torch.int64)
    return call(aten.add.Tensor, before, call(aten.sub.Tensor, call(aten.cumsum.default, own, 1), own))


def _beside(editor: Editor, first: Node, positions: Node, value: Node) -> Node:
    """A value [B, T] or [B, 1] with its dimensions where positions have theirs."""
    axes, dims = editor.program.axes, editor.program.axes.of(positions)
    rows, tokens = axes.of(first)[:2]
    sizes: list[object] = [1] * len(dims)
    at = next((i for i, dim in enumerate(dims) if tokens and dim == tokens), None)
    batch = next((i for i, dim in enumerate(dims) if rows and dim == rows), None)
    many, wide = (not _is_one(value, dim) for dim in (0, 1))
    if batch is None and many and len(dims) > 1:  # positions that all rows share
        spot = len(dims) - 2 if at is None else at - 1
        batch = spot if spot >= 0 and not dims[spot] else None
    if (wide and at is None) or (many and batch is None) or (wide and many and batch > at):
        raise CaptureError(
            "positions of this step cannot tell rows apart that were given other tokens",
            where=[place(positions)],
            found=f"positions {tuple(positions.meta['val'].shape)}",
            remedy="pass position_ids [B, T]",
        )
    if batch is not None:
        sizes[batch] = editor.size(value, 0)
    if wide:
        sizes[at] = editor.size(value, 1)
    return editor.call(aten.reshape.default, value, sizes)


def _is_one(value: Node, dim: int) -> bool:
    size = value.meta["val"].shape[dim]
    return isinstance(size, int) and size == 1


def _hand_on(program: Program, given: Sequence[_Given]) -> None:
    """Tell later steps how many tokens each row has now."""
    for each in given:
        if each.before is None or each.flags is None:
            continue
        editor = Editor(program, each.rule)
        with editor.after([each.before, each.flags]):
            own = editor.call(aten.sum.dim_IntList, each.flags, [1])
            total = editor.call(aten.add.Tensor, each.before, own)
        hand_on(program, given_name(each.rule, each.step.name), total)
