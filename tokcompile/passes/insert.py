"""insert: put tokens that are none of the model's own into a sequence."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.decoding.carried import given_name, hand_on
from tokcompile.editing.edit import Editor, Length, length_value
from tokcompile.editing.inserted import originals
from tokcompile.editing.tokenmap import TokenMap
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.drop import check_positions
from tokcompile.passes.insertplaces import Slots, find_slots
from tokcompile.passes.readout import read_out
from tokcompile.program import place as node_place
from tokcompile.sites import Place, resolve_address
from tokcompile.sites.features import Sequence, sequence
from tokcompile.steps import Insert

aten = torch.ops.aten
tokred = torch.ops.tokred


def insert(ctx: Context, step: Insert) -> None:
    """Put tokens in at the step's address; none leave the graph as it is."""
    place = resolve_address(ctx.sites, step.at)
    at = _rows_of_tokens(ctx, place)
    until = _until(ctx, step, place)
    if step.positions == "compact" and not step.at.startswith("embedding"):
        check_positions(ctx, place)
    editor, node = ctx.editor, place.node
    padding = ctx.sites.paddings.get(ctx.stack_of(at.axis) or "")
    with editor.after([node, *([padding] if padding is not None else [])]):
        valid = ctx.valid_mask(at.axis)
        old = editor.size(node, at.dim)
        slots = find_slots(ctx, step, node, at, old, valid)
        record = {"verb": "insert", "at": step.at, "name": step.name, "where": step.where}
        ctx.values[step.name] = slots
        ctx.log.append({**record, "from": str(length_value(old)), "to": str(length_value(slots.new))})
        _count_given(ctx, step, node)
        if slots.fresh is None:
            _check_nothing(step, place)
            return
        token_map = _map(ctx, step, node, at, old, slots, valid)
        tokens = _content(ctx, step, node, slots, valid)
        content = editor.call(
            tokred.insert_tokens.default, node, token_map.source, token_map.fresh, tokens, name="inserted"
        )
    transport = Transport(editor, ctx.sites)
    transport.apply(node, token_map, content, until)
    if step.cached is False:
        _leave_out(ctx, transport, token_map)
    ctx.refresh()
    if step.readout == "tokens":
        read_out(ctx, step, place.owner, content, slots)


def _rows_of_tokens(ctx: Context, place: Place) -> Sequence:
    """The sequence of a value [B, T, C]."""
    at = sequence(ctx.program, ctx.sites, place.node)
    if at is None or at.packed or place.node.meta["val"].ndim != 3:
        raise EditError(
            "tokens can be inserted into a value [B, T, C]",
            where=[place.address, node_place(place.node)],
            found=f"{tuple(place.node.meta['val'].shape)}",
            remedy="insert where each row of the batch has its own tokens, and these are a plain sequence",
        )
    return at


def _until(ctx: Context, step: Insert, place: Place) -> Node | None:
    """The value from which on inserted tokens are gone again."""
    if step.until is None:
        return None
    until = resolve_address(ctx.sites, step.until).node
    if not ctx.sites.reach.above(place.node, until):
        raise EditError(
            "inserted tokens would be taken out before they are there",
            where=[step.at, step.until],
            remedy="an address further down: head.input, vision.-1.output",
        )
    return until


def _check_nothing(step: Insert, place: Place) -> None:
    if step.readout == "tokens":
        raise EditError("no tokens are inserted, and so none can be read out", where=[place.address], remedy="count: 1")


def _count_given(ctx: Context, step: Insert, node: Node) -> None:
    """Hand on that no later step gave a row any of these tokens yet, where positions of its text pass them over."""
    program, counts = ctx.program, step.into_text and step.positions == "keep" and step.content == "learned"
    if counts and program.carried is not None and ctx.sites.caches:
        rows = ctx.editor.size(node, 0)
        none = ctx.editor.call(aten.new_zeros.default, node, [rows], dtype=torch.int64)
        hand_on(program, given_name(ctx.editor.rule, step.name), none)


def _map(
    ctx: Context, step: Insert, node: Node, at: Sequence, old: Length, slots: Slots, valid: Node | None
) -> TokenMap:
    call = ctx.editor.call
    like = call(aten.select.int, node, -1, 0)
    source = call(tokred.inserted_source.default, slots.fresh, like, slots.first, name="source")
    return TokenMap(
        at.axis,
        at.rows,
        source,
        call(aten.ones_like.default, like, dtype=torch.bool),
        old,
        slots.new,
        step.positions,
        fresh=slots.fresh,
        inverse=call(tokred.original_places.default, slots.fresh, like),
        silent=step.fresh == "none",
        following=step.fresh == "follow",
        run=slots.run,
    )


def _leave_out(ctx: Context, transport: Transport, token_map: TokenMap) -> None:
    """Let the graph hand back the old tokens alone."""
    output = ctx.program.output
    for node in output.all_input_nodes:
        if token_map in transport.edited.get(node, []):
            ctx.editor.swap_input(output, node, originals(transport, node, token_map))


def _content(ctx: Context, step: Insert, node: Node, slots: Slots, valid: Node | None) -> Node:
    """[B or 1, M, C]: the inserted tokens in their order; one where all are alike."""
    editor, value = ctx.editor, node.meta["val"]
    width = value.shape[-1]
    if not isinstance(width, int):
        raise EditError("tokens are inserted where each has a known width", where=[node_place(node)], found=str(width))
    if step.content == "zero":
        return editor.call(aten.new_zeros.default, node, [1, 1, width])
    if step.content == "mean":
        return _mean(ctx, node, valid)
    if step.content in ("prefix_suffix", "repeat", "random"):
        return _own(ctx, step, node, slots, valid)
    count = 1 if step.shared else length_value(slots.count)
    if not isinstance(count, int):
        raise EditError(
            "how many vectors are learned is not known: their number follows from the length of the text",
            where=[step.at],
            remedy="`shared: true`, one vector for all places; or compile with a static length",
        )
    return editor.call(aten.unsqueeze.default, learned_tokens(editor, step, count, value), 0)


def learned_tokens(editor: Editor, step: Insert, count: int, like: torch.Tensor) -> Node:
    """[M, C]: the parameter that holds a step's tokens; `like` is what they are put into."""
    width = int(like.shape[-1])

    def make() -> torch.Tensor:
        rng = torch.Generator().manual_seed(0)
        drawn = torch.randn(count, width, generator=rng) * float(step.std)
        return drawn.to(device=like.device, dtype=like.dtype)

    return editor.parameter(step.name, (count, width), make)


def _own(ctx: Context, step: Insert, node: Node, slots: Slots, valid: Node | None) -> Node:
    """[B or 1, M, C]: embeddings of tokens that the model knows."""
    call, count = ctx.editor.call, length_value(slots.count)
    if not isinstance(count, int):
        raise EditError(
            "how many tokens are put in follows from the length of the text, and what they hold is not known",
            where=[step.at],
            remedy="`where: end` or another place with a `count`, or compile with a static length",
        )
    if step.content == "random":
        return _random(ctx, step, node, count)
    lead, count = (min(int(step.lead), count), count) if step.content == "prefix_suffix" else (0, 1)
    like = call(aten.select.int, node, -1, 0)
    places = call(tokred.end_places.default, like, valid, lead, count)
    return call(tokred.gather_tokens.default, node, places, 1, 0)


def _random(ctx: Context, step: Insert, node: Node, count: int) -> Node:
    """[1, M, C]: random rows of the table of embeddings, each row as likely as any other."""
    if node.target is not aten.embedding.default:
        raise EditError("random tokens are put in where a table of embeddings is read", where=[node_place(node)])
    call, table = ctx.editor.call, node.args[0]
    like = call(aten.new_zeros.default, node, [1, count])
    drawn = call(tokred.random_scores.default, like, int(step.seed))
    rows = call(aten.mul.Scalar, drawn, int(table.meta["val"].shape[0]))
    return call(aten.embedding.default, table, call(aten.to.dtype, rows, torch.int64))


def _mean(ctx: Context, node: Node, valid: Node | None) -> Node:
    """[B, 1, C]: the mean of the real tokens of each row, summed in float32."""
    call = ctx.editor.call
    wide = call(aten.to.dtype, node, torch.float32)
    if valid is None:
        mean = call(aten.mean.dim, wide, [1], True)
    else:
        real = call(aten.unsqueeze.default, call(aten.to.dtype, valid, torch.float32), -1)
        total = call(aten.sum.dim_IntList, call(aten.mul.Tensor, wide, real), [1], True)
        mean = call(aten.div.Tensor, total, call(aten.clamp.default, call(aten.sum.dim_IntList, real, [1], True), 1))
    return call(aten.to.dtype, mean, node.meta["val"].dtype)
