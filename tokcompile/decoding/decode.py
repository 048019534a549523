"""A graph that continues a sequence: what a rule that pruned the prompt, or put tokens in, means for each later step.

The cache that such a graph is given is already short or long, and tokens are chosen once, in the prefill. What is left
are the padding (`padding.py`) and the rotary positions of the new tokens. Under `positions: keep` they are what the
caller says. Under `compact` they are smaller by the number of tokens dropped, or larger by those put in, which differs
from layer to layer as the caches do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from tokcompile.address import parse_address
from tokcompile.applied import Applied
from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.binding import RuleInstance
from tokcompile.decoding.carried import evicted_name
from tokcompile.decoding.emptyslots import follow_slots
from tokcompile.decoding.fixedslots import check_rules, dropped_before, follow_fixed, is_fixed
from tokcompile.decoding.padding import Cut, follow_padding, takes_padding, told
from tokcompile.decoding.placetables import counted_rows
from tokcompile.editing.edit import Editor, Length, sub
from tokcompile.editing.positions import recompute
from tokcompile.errors import CaptureError
from tokcompile.expr import has_expression, substitute
from tokcompile.passes.jointheads import is_joint, shares_budget
from tokcompile.program import Program, place
from tokcompile.sites import Block, Sites, find_sites, resolve_caches, window_of
from tokcompile.steps import Drop, Evict, Insert, Mark, Merge, Step

aten = torch.ops.aten


def adapt_decode(
    program: Program, rules: Sequence[RuleInstance], facts: Mapping[str, int], applied: Sequence[Applied]
) -> None:
    """Let a step continue after a prompt that rules pruned.

    Drops of several rules at one block are counted together: what the caches say is their sum.

    Raises:
        CaptureError: the position of the new tokens, or what is padding, cannot be known from the inputs.
    """
    sites = find_sites(program)
    depth = len(sites.stacks["decoder"].blocks)
    drops = [
        (_first_block(step, depth), step, rule, record)
        for rule, record in zip(rules, applied, strict=True)
        for step in _edits(rule, facts)
    ]
    marks = [(_first_block(step, depth), step, rule) for rule in rules for step in _marks(rule, facts)]
    first_mark = min((first for first, _, _ in marks), default=None)
    cuts = [
        Cut(
            first,
            not isinstance(step, Insert) and takes_padding(rule.rule, step, _known(rule, facts)),
            f"{rule.rule.path}:{step.line}",
            step if isinstance(step, Insert) else None,
        )
        for first, step, rule, _ in drops
    ]
    for rule in rules:
        cuts += _evictions(program, sites, rule, _known(rule, facts))
    evicted = {cut.first for cut in cuts if cut.alone}
    editor = Editor(program, rules[0].name, applied[0].counts)
    padding = sites.padding
    if is_fixed(sites):
        check_rules(rules)
        follow_fixed(program, sites, cuts, editor)
        sites = find_sites(program)
    elif cuts:
        follow_padding(program, sites, cuts, editor, first_mark)
        sites = find_sites(program)
    if first_mark is not None:
        _check_marks(program, sites, drops, marks)
        follow_slots(program, sites, sorted({first for first, *_ in (*marks, *drops)}), first_mark, editor)
        sites = find_sites(program)
    places = sorted({d[0] for d in drops if d[0] < depth})
    for first in places:
        here = [d for d in drops if d[0] == first]
        if len({step.positions for _, step, _, _ in here}) > 1:
            raise CaptureError(
                f"edits at block {first} both keep and compact positions",
                where=[f"{rule.rule.path}:{step.line}" for _, step, rule, _ in here],
                remedy="give them the same positions, or edit at different blocks",
            )
        _, step, rule, record = here[0]
        _check_table(program, sites, [s for _, s, _, _ in here if isinstance(s, Insert)], rule)
        if step.positions == "compact":
            _compact(program, _again(program, padding), rule, places, first, record, evicted)
        elif first == 0:
            _check_given(program, sites, rule, step)


def _again(program: Program, padding: Node | None) -> Sites:
    """The sites as they are now, with the caller's padding mask, which no attention may read any more."""
    sites = find_sites(program)
    text = sites.text_stack()
    if padding is not None and text is not None:
        sites.paddings.setdefault(text[0], padding)
    return sites


def _edits(rule: RuleInstance, facts: Mapping[str, int]) -> list[Drop | Merge | Insert]:
    """The steps of a rule that change the length of a text, with their values filled in.

    Steps that choose may need facts that only a prompt has.
    """
    known = _known(rule, facts)
    found: list[Drop | Merge | Insert] = []
    for step in rule.rule.steps:
        if isinstance(step, Merge) and (step.of_caches or _writes_back(step, known)):
            continue
        if isinstance(step, Drop | Merge):
            values = {f: str(substitute(getattr(step, f), known)) for f in ("at", "positions")}
            found.append(step.model_copy(update=values))
        elif isinstance(step, Insert) and step.into_text:
            given = {f: v for f, v in step.given().items() if has_expression(v)}
            step = step.model_copy(update={f: substitute(v, known) for f, v in given.items()})
            if step.cached:  # else no cache holds them, and the old tokens are as they were
                found.append(step)
    return found


def _evictions(program: Program, sites: Sites, rule: RuleInstance, known: Mapping[str, Any]) -> list[Cut]:
    """Evictions as cuts, one for each cache: each may hold another number of tokens."""
    found = []
    for step in rule.rule.steps:
        if not isinstance(step, Evict):
            continue
        _check_given(program, sites, rule, step)
        at = str(substitute(step.at, known))
        takes = takes_padding(rule.rule, step, known)
        place = f"{rule.rule.path}:{step.line}"
        for index, block, _ in resolve_caches(sites, at):
            if window_of(block.attention, sites.reach) is None:
                joint = is_joint(rule.rule, step, known) and shares_budget(sites, index)
                found.append(Cut(index, takes, place, alone=True, joint=joint))
    return found


def _writes_back(step: Merge, known: Mapping[str, Any]) -> bool:
    """Whether a merge leaves the sequence as long as it was."""
    given = step.write_back
    return bool(substitute(given, known) if has_expression(given) else given)


def _marks(rule: RuleInstance, facts: Mapping[str, int]) -> list[Mark]:
    """The marks of a rule, with their addresses filled in."""
    known = _known(rule, facts)
    steps = [step for step in rule.rule.steps if isinstance(step, Mark)]
    return [step.model_copy(update={"at": str(substitute(step.at, known))}) for step in steps]


def _known(rule: RuleInstance, facts: Mapping[str, int]) -> dict[str, object]:
    return {k: v for k, v in rule.params.items() if not has_expression(v)} | dict(facts)


def _first_block(step: Drop | Merge | Mark | Insert, depth: int) -> int:
    """The first decoder block whose cache an edit changed."""
    address = parse_address(step.at)
    if address.stack != "decoder" or address.index is None:
        return 0
    index = int(address.index)
    return (index + depth if index < 0 else index) + (address.part == "output")


def _check_marks(program: Program, sites: Sites, drops: Sequence[tuple], marks: Sequence[tuple]) -> None:
    """Refuse positions that are counted from caches: these hold markers, whose number depends on the data."""
    for first, step, rule in marks:
        if first == 0:
            _check_given(program, sites, rule, step)
    compacted = [f"{rule.rule.path}:{step.line}" for _, step, rule, _ in drops if step.positions == "compact"]
    if compacted:
        raise CaptureError(
            "positions of new tokens cannot be compacted after a mark",
            where=[*compacted, *(f"{rule.rule.path}:{step.line}" for _, step, rule in marks)],
            found="caches with markers and empty slots: they do not say how many tokens were dropped",
            remedy="use `positions: keep` in drop steps",
        )


def _check_table(program: Program, sites: Sites, inserts: Sequence[Insert], instance: RuleInstance) -> None:
    """Refuse to go on where later tokens get positions that are not known: those of a table, or after tokens left."""
    for step in inserts:
        until = None if step.until is None else parse_address(step.until)
        if until is not None and until.stack == "decoder" and str(until) != "decoder.-1.output":
            raise CaptureError(
                f"rule '{instance.name}' takes inserted tokens out between blocks, and this step continues from there",
                where=[f"{instance.rule.path}:{step.line}"],
                found=f"until: {step.until}",
                remedy="until: head.input, or call the model with use_cache=False",
            )
        if step.positions == "compact" and not sites.rotary["decoder"]:
            raise CaptureError(
                f"rule '{instance.name}' numbered the prompt anew, and positions of this step come from a table",
                where=[f"{instance.rule.path}:{step.line}"],
                found="learned positions, or a bias",
                remedy="positions: keep with fresh: none, or call the model with use_cache=False",
            )


def _check_given(program: Program, sites: Sites, instance: RuleInstance, step: Step) -> None:
    """Kept positions must come from the caller: counted from the short cache they would be wrong."""
    inputs = [n for n in program.inputs() if not n.meta["val"].dtype.is_floating_point]
    for rotary in sites.rotary["decoder"]:
        if not sites.reach.any_above(rotary.positions, inputs):
            raise CaptureError(
                f"rule '{instance.name}' changed the prompt's tokens, and this step counts its position from the cache",
                where=[f"{instance.rule.path}:{step.line}"],
                found="neither position_ids nor attention_mask is given",
                remedy="pass position_ids (of the sequence as it was), as model.generate does",
            )
    counted = counted_rows(program, sites)
    if counted is not None:
        raise CaptureError(
            f"rule '{instance.name}' changed the prompt's tokens, and this step counts its position from the cache",
            where=[f"{instance.rule.path}:{step.line}", place(counted)],
            found="rows of a table of positions, which position_ids do not pick",
            remedy="pass position_ids (of the sequence as it was), as model.generate does where a model takes them",
        )


def _compact(
    program: Program,
    sites: Sites,
    instance: RuleInstance,
    places: Sequence[int],
    first: int,
    applied: Applied,
    evicted: set[int],
) -> None:
    """Number the new tokens from block `first` on, one of the places of drops, by those that each block has seen.

    These are what its cache holds, and in `evicted` blocks what that lost.
    """
    blocks = sites.stacks["decoder"].blocks
    editor = Editor(program, instance.name, applied.counts)
    region = region_of(program, sites, blocks[first].input)
    for rotary in sites.rotary["decoder"]:
        positions = rotary.positions
        with editor.after([positions]):
            made = _positions(editor, sites, positions, places, first, evicted)
        renumber(editor, sites, region, positions, made)
    applied.steps.append({"verb": "decode", "positions": "compact", "from_block": first})
    program.changed()


def region_of(program: Program, sites: Sites, start: Node) -> list[Node]:
    """The input of a block and what depends on it, but for the outputs of the graph, which also return earlier caches.

    In graph order, the input first.
    """
    return sorted(set(sites.reach.forward(start)) - {program.output}, key=sites.reach.order.__getitem__)


def renumber(
    editor: Editor, sites: Sites, region: Sequence[Node], positions: Node, made: Node, tables: Sequence[Node] = ()
) -> None:
    """Compute the tables that blocks read from new positions.

    Args:
        region: see `region_of`.
        tables: cosines and sines; only what is made of these, if there are any given.
    """
    done, inside = {positions: made}, set(region)
    for node in region[1:]:
        for table in _tables(node, inside, positions, sites):
            if tables and not sites.reach.any_above(table, tables):
                continue
            with editor.before(node):
                editor.swap_input(node, table, recompute(editor, table, positions, done))


def _tables(node: Node, region: set[Node], positions: Node, sites: Sites) -> list[Node]:
    """Position tables that a block reads."""
    return [
        v
        for v in node.all_input_nodes
        if v not in region
        and isinstance(v.meta.get("val"), torch.Tensor)
        and v.meta["val"].dtype.is_floating_point
        and v in sites.reach.order
        and sites.reach.above(positions, v)
    ]


def _positions(
    editor: Editor, sites: Sites, positions: Node, places: Sequence[int], first: int, evicted: set[int]
) -> Node:
    """Positions of the new tokens from block `first` on, of the shape of those before it.

    They are smaller by the tokens dropped there: what the keys are fewer than those of the block before, or than the
    tokens that the caller's mask still counts. Keys that an eviction took are none of these.
    """
    blocks = sites.stacks["decoder"].blocks
    block = blocks[first]
    if is_fixed(sites):
        return _from_fixed(editor, sites, positions, places, first, evicted)
    queries = editor.size(block.input, 1)
    past, source = _past(editor, sites, blocks[first : min((p for p in places if p > first), default=len(blocks))])
    lost = _lost(editor, positions, blocks.index(source), evicted)
    if first:
        start = max((p for p in places if p < first), default=0)
        before, source = _past(editor, sites, blocks[start:first])
        own = editor.call(aten.sub.Tensor, positions, editor.arithmetic(sub, before, past))
        return _plus(editor, own, lost, _lost(editor, positions, blocks.index(source), evicted))
    if sites.padding is not None:
        counted = editor.size(sites.padding, 1)
        dropped = editor.arithmetic(lambda mask, old, new: mask - old - new, counted, past, queries)
        return _plus(editor, editor.call(aten.sub.Tensor, positions, dropped), lost)
    if queries == 1:
        return _plus(editor, editor.call(aten.full_like.default, positions, past), lost)
    dims = editor.program.axes.of(positions)
    tokens = editor.program.axes.of(block.input)[1]
    index = editor.call(aten.arange.default, queries, device=positions.meta["val"].device)
    index = editor.call(aten.add.Tensor, index, past)
    index = editor.call(aten.view.default, index, [-1 if dim == tokens else 1 for dim in dims])
    spread = editor.call(aten.expand.default, index, [editor.size(positions, i) for i in range(len(dims))])
    return _plus(editor, spread, lost)


def _from_fixed(
    editor: Editor, sites: Sites, positions: Node, places: Sequence[int], first: int, evicted: set[int]
) -> Node:
    """The same where a cache's size does not say how many tokens it holds: what it lacks was handed on."""
    lost = _lost(editor, positions, first, evicted)
    less = editor.call(aten.sub.Tensor, positions, dropped_before(editor, sites, positions, first))
    own = _plus(editor, less, lost)
    if not first:
        return own
    start = max((p for p in places if p < first), default=0)
    own = editor.call(aten.add.Tensor, own, dropped_before(editor, sites, positions, start))
    return _plus(editor, own, None, _lost(editor, positions, start, evicted))


def _lost(editor: Editor, positions: Node, block: int, evicted: set[int]) -> Node | None:
    """How many keys an eviction took from a block's cache, of as many dimensions as positions and equal in all rows."""
    if block not in evicted:
        return None
    count = told(editor, positions, evicted_name(block), "how many keys each cache lost")
    one = editor.call(aten.slice.Tensor, count, 0, 0, 1)
    return editor.call(aten.view.default, one, [1] * positions.meta["val"].ndim)


def _plus(editor: Editor, positions: Node, more: Node | None, less: Node | None = None) -> Node:
    if more is not None:
        positions = editor.call(aten.add.Tensor, positions, more)
    return positions if less is None else editor.call(aten.sub.Tensor, positions, less)


def _past(editor: Editor, sites: Sites, blocks: Sequence[Block]) -> tuple[Length, Block]:
    """How many tokens the caches of some blocks hold: of one, given too, that is not the last of a window alone.

    Raises:
        CaptureError: each of them is the cache of a window that is full.
    """
    for block in blocks:
        cache = sites.caches[block]
        if cache.past is not None and not any(_last_alone(user, cache.key) for user in cache.key.users):
            return editor.size(cache.past, 2), block
    raise CaptureError(
        "the positions of new tokens cannot be compacted: no cache says how many tokens of the prompt stayed",
        where=[place(blocks[0].attention.node)],
        found="caches of the last tokens alone, as a sliding window has",
        remedy="use `positions: keep`",
    )


def _last_alone(user: Node, keys: Node) -> bool:
    """Whether a user takes the last of the keys [B, H, T, D] alone, as a window's cache does that is full."""
    if user.target is not aten.slice.Tensor or user.args[1] % keys.meta["val"].ndim != 2:
        return False
    return not same(size_of(user.meta["val"].shape[2]), size_of(keys.meta["val"].shape[2]))
