"""What tokens that a rule puts into a sequence have of the values that a model made for the old ones.

An attention mask treats a fresh token like the old one beside it, and lets nobody see it earlier than its place. A bias
of the scores, or what is added to the tokens, is 0 for it. Rotary tables are computed again from its position. Flags
that tell kinds of tokens apart (image tokens) are False. Whoever takes tokens by place gets the old ones.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tokcompile.axes import resolve
from tokcompile.axes.rules import RULES as AXIS_RULES
from tokcompile.axes.rules import reduce
from tokcompile.editing.positions import positions_of
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.sight import hides_later_keys

if TYPE_CHECKING:
    from tokcompile.editing.tokenmap import TokenMap
    from tokcompile.editing.transport import Transport

aten = torch.ops.aten
_ADDS = {aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor}
_SPREADS = {aten.expand.default, aten.broadcast_to.default}
_FLAGGED = {
    torch.ops.tokred.flagged_tokens.default,
    torch.ops.tokred.listed_tokens.default,
    torch.ops.tokred.add_tokens.default,
}
_ATTENTIONS = {aten.scaled_dot_product_attention.default}


class Kind(enum.Enum):
    """What a fresh token has of a value."""

    LIKE = "like"
    """what the old token beside it has"""
    MASK = "mask"
    """the same, but hidden from earlier tokens"""
    NOTHING = "nothing"
    """0, or False"""
    COUNTED = "counted"
    """what follows from its position"""
    SUM = "sum"
    """the sum of what it has of two values"""


def kind(transport: Transport, user: Node, value: Node, token_map: TokenMap) -> Kind:
    """What fresh tokens have of a value that a user reads.

    Raises:
        EditError: nobody knows.
    """
    if token_map.fresh is None:
        return Kind.LIKE
    val = value.meta["val"]
    if user.target in _FLAGGED and value is user.args[1]:  # tokens of another rule
        return Kind.NOTHING
    if value.target in _SPREADS and not transport.where(value.args[0], token_map.axis):  # the same for all tokens
        return Kind.LIKE
    if _is_mask(transport, user, value):
        return _of_scores(transport, value, token_map)
    if not val.dtype.is_floating_point and not val.dtype.is_complex:
        flags = val.dtype == torch.bool and not _from_padding(transport, value)
        return Kind.NOTHING if flags else Kind.LIKE
    positions = positions_of(transport, value, token_map)
    if positions is not None and positions in transport.rotary:
        return Kind.COUNTED
    if user.target in _ADDS and _added_to_scores(transport, user, token_map):
        return _of_scores(transport, value, token_map)
    if _from_padding(transport, value) and not transport.sites.reach.any_above(value, _weights(transport)):
        return Kind.LIKE
    if user.target in _ADDS:
        if token_map.following and positions is None and _of_caller(transport, value, token_map):
            raise EditError(
                "tokens that a rule puts in behind a text need its next positions, and which numbers are positions is "
                "not known",
                where=[place(user)],
                found=f"'{value.name}' {tuple(val.shape)}, looked up by numbers that the caller gives, and added",
                remedy="call the model without position_ids, or use a model with rotary positions",
            )
        return Kind.COUNTED if positions is not None and not token_map.silent else Kind.NOTHING
    raise EditError(
        "a value that a model made for its own tokens says nothing of those that a rule puts in",
        where=[place(user)],
        found=f"'{value.name}' {tuple(val.shape)} in '{user.target}'",
        remedy="insert further down, where tokens have all that they need",
    )


def _of_caller(transport: Transport, value: Node, token_map: TokenMap) -> bool:
    """Whether a value is computed from integers that the caller gives for each token, padding apart."""
    paddings = set(transport.sites.paddings.values())
    given = [n for n in transport.editor.program.inputs() if not n.meta["val"].dtype.is_floating_point]
    by_token = [n for n in given if n not in paddings and transport.where(n, token_map.axis)]
    return value in transport.sites.reach.order and transport.sites.reach.any_above(value, by_token)


def _is_mask(transport: Transport, user: Node, value: Node) -> bool:
    named = getattr(getattr(user.target, "_schema", None), "name", "")
    fused = user.target in _ATTENTIONS or named == "tokred::attention"
    return fused or any(value is site.mask for site in transport.sites.attentions)


def _added_to_scores(transport: Transport, user: Node, token_map: TokenMap) -> bool:
    """Whether a sum has a dimension for queries and one for keys of the sequence."""
    return len(transport.where(user, token_map.axis)) > 1


def _from_padding(transport: Transport, value: Node) -> bool:
    """Whether a value says what is padding, and nothing of kinds of tokens."""
    reach = transport.sites.reach
    paddings = set(transport.sites.paddings.values())
    if value not in reach.order:
        return False
    inputs = {n for n in transport.editor.program.inputs() if not n.meta["val"].dtype.is_floating_point}
    return reach.any_above(value, paddings) and not reach.any_above(value, inputs - paddings)


def _of_scores(transport: Transport, value: Node, token_map: TokenMap) -> Kind:
    val, spots = value.meta["val"], transport.where(value, token_map.axis)
    if val.dtype.is_floating_point and value.target in _ADDS:
        parts = [a for a in value.args[:2] if isinstance(a, Node) and transport.where(a, token_map.axis)]
        if value.target is aten.add.Tensor and len(parts) == 2:
            return Kind.SUM
    if val.dtype.is_floating_point and _is_bias(transport, value, token_map):
        return Kind.NOTHING
    return Kind.MASK if len(spots) > 1 else Kind.LIKE


def _is_bias(transport: Transport, value: Node, token_map: TokenMap) -> bool:
    """Whether a value is added to scores for its own sake: learnt, or another one for each head."""
    dims, rows = transport.of(value), resolve(token_map.rows)
    learnt = value in transport.sites.reach.order and transport.sites.reach.any_above(value, _weights(transport))
    by_head = len(dims) > 2 and dims[-3] and not any(atom in rows for atom in dims[-3])
    return learnt or bool(by_head)


def _weights(transport: Transport) -> list[Node]:
    """Weights and buffers of floating-point numbers."""
    return [n for n in transport.editor.program.inputs("parameter") if n.meta["val"].dtype.is_floating_point]


def moved_sum(transport: Transport, value: Node, token_map: TokenMap, aligned: tuple[int, int]) -> Node:
    """A mask and a bias that were added before: each on the new axis by itself, and then their sum."""
    parts = {}
    for part in value.args[:2]:
        beside = transport.align(value, part, token_map) if token_map.rows else aligned
        parts[part] = transport.brought(part, token_map, beside, _of_scores(transport, part, token_map))
    return transport.editor.clone(value, parts)


def finish(
    transport: Transport, value: Node, moved: Node, token_map: TokenMap, aligned: tuple[int, int], what: Kind
) -> Node:
    """Give fresh tokens their part of a value that was gathered by the map's source.

    Args:
        moved: the value so, with dimensions in front as `aligned` says.
    """
    if token_map.fresh is None or what is Kind.LIKE:
        return moved
    lead = aligned[0]
    spots = [spot + lead for spot in transport.where(value, token_map.axis)]
    if any(dim != resolve(token_map.axis) for dim in transport.of(value) if transport.counts(dim, token_map.axis)):
        raise EditError(
            "a value that flattens rows and tokens says nothing of those that a rule puts in",
            where=[place(value)],
            found=f"{tuple(value.meta['val'].shape)}",
        )
    fresh = [_broadcast(transport, moved, token_map, spot, aligned[1]) for spot in spots]
    if what is Kind.NOTHING:
        for flags in fresh:
            moved = transport.editor.call(aten.masked_fill.Scalar, moved, flags, 0)
        return moved
    return _hide_later(transport, value, moved, token_map, fresh)


def _broadcast(transport: Transport, moved: Node, token_map: TokenMap, spot: int, batch: int) -> Node:
    """The flags of fresh tokens, in the dimensions of a value that has tokens in one and rows in another."""
    call, fresh = transport.editor.call, token_map.fresh
    rank = moved.meta["val"].ndim
    if batch < 0:
        fresh = call(aten.select.int, fresh, 0, 0)
        return call(aten.reshape.default, fresh, [-1, *[1] * (rank - 1 - spot)])
    if batch > spot:
        raise EditError("a value has its rows behind its tokens", where=[place(moved)])
    sizes = [1] * rank
    sizes[batch], sizes[spot] = transport.editor.size(fresh, 0), token_map.new
    return call(aten.reshape.default, fresh, sizes)


def _hide_later(transport: Transport, value: Node, moved: Node, token_map: TokenMap, fresh: list[Node]) -> Node:
    """Where a mask hides later keys, hide a fresh key from earlier queries, and later keys from a fresh query."""
    causal = hides_later_keys(value, transport.sites.reach)
    if causal is None:
        raise EditError(
            "what a mask hides is not known, and so neither who may see tokens that a rule puts in",
            where=[place(value)],
            found=f"{tuple(value.meta['val'].shape)}",
        )
    if not causal:
        return moved
    call, device = transport.editor.call, moved.meta["val"].device
    index = call(aten.arange.default, token_map.new, device=device)
    later = call(aten.gt.Tensor, index, call(aten.unsqueeze.default, index, 1))
    hidden = call(aten.logical_and.default, later, call(aten.logical_or.default, *fresh))
    dtype = moved.meta["val"].dtype
    return call(aten.masked_fill.Scalar, moved, hidden, torch.finfo(dtype).min if dtype.is_floating_point else False)


# Whoever takes tokens by place, or all of them together.


def originals(transport: Transport, value: Node, token_map: TokenMap) -> Node:
    """The old tokens of a value on the new axis."""
    key = (value, token_map)
    if key not in transport.originals:
        spots = transport.where(value, token_map.axis)
        back = replace(token_map, source=token_map.inverse, old=token_map.new, new=token_map.old)
        with transport.editor.after([value, token_map.inverse]):
            made, spot, _ = transport.move_dim(value, back, spots[0])
        if len(spots) != 1 or made.meta["val"].ndim != value.meta["val"].ndim:
            raise EditError(
                "the old tokens cannot be taken out of a value again",
                where=[place(value)],
                found=f"{tuple(value.meta['val'].shape)}",
            )
        transport.mark_old(made, value)
        transport.originals[key] = made
    return transport.originals[key]


def take_out(transport: Transport, value: Node, token_map: TokenMap) -> None:
    """Let all that reads a value read its old tokens alone."""
    users = [u for u in value.users if u not in transport.editor.made]
    old = originals(transport, value, token_map)
    for user in users:
        transport.editor.swap_input(user, value, old)


def refuse_mixing(transport: Transport, node: Node, token_map: TokenMap) -> None:
    """Refuse a mean, or its like, over old and fresh tokens together."""
    value = node.args[0] if node.args else None
    if AXIS_RULES.get(node.target) is not reduce or not isinstance(value, Node):
        return
    mixes = value.meta["val"].dtype.is_floating_point and not transport.where(node, token_map.axis)
    if mixes and transport.where(value, token_map.axis):
        raise EditError(
            "the model takes all tokens together, and would mix those that a rule puts in among its own",
            where=[place(node)],
            found=f"'{node.target}' over {tuple(value.meta['val'].shape)}",
            remedy="take them out before, with `until`: vision.-1.output, or head.input",
        )
