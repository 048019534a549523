"""What steps that change rotary positions share: the tables of a stack, and offsets that later steps go on from."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.decoding.carried import hand_on, take
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.program import place as node_place
from tokcompile.sites.address import addresses, resolve_address
from tokcompile.sites.turns import Frequencies, find_turns

aten = torch.ops.aten
tokred = torch.ops.tokred
_MAX = 2**62


def rotary_sites(ctx: Context, stack: str, at: str) -> list[Frequencies]:
    """The rotary tables of a stack.

    Raises:
        AddressError: there is no such stack.
        EditError: it has no rotary tables, or some that are not known or that a layer of a rule reads.
    """
    resolve_address(ctx.sites, f"{stack}.0.input")
    found = find_turns(ctx.program, ctx.sites, stack)
    layers = [node for each in found for node in each.layers]
    if layers:
        raise EditError(
            "a layer of a rule reads the rotary tables as they are",
            where=[at, node_place(layers[0])],
            remedy="put the rule that places or rotates first",
        )
    if found:
        return found
    raise EditError(
        f"the {stack} has no rotary tables that are computed from positions",
        where=[at],
        found=f"positions that are added to embeddings, or none; this graph has {', '.join(addresses(ctx.sites))}",
        remedy="use it on a model whose positions turn queries and keys",
    )


def in_parts(ctx: Context, value: Node) -> bool:
    """Whether a value is computed from positions that an earlier step counts in parts of 1."""
    parts = [n for n in ctx.sites.reach.order if n.target is tokred.variable_positions.default]
    return ctx.sites.reach.any_above(value, parts)


def refuse_fractions(ctx: Context, frequencies: Frequencies, at: str) -> None:
    """Refuse positions that an earlier step counts in parts of 1, where whole ones are needed."""
    if in_parts(ctx, frequencies.angles):
        raise EditError(
            "positions are fractions, and this step counts whole ones",
            where=[at],
            found="tokens that an earlier step gave positions in parts of 1",
            remedy="use one of the two steps",
        )


def last_of(ctx: Context, value: Node) -> Node:
    """The last token of a value [B, T], as [B, 1]."""
    return ctx.editor.call(aten.slice.Tensor, value, 1, -1, _MAX)


def keep_offset(ctx: Context, usual: Node, given: Node, name: str) -> None:
    """Hand on by how much less the last token's position is than usual; both are int64 [B or 1, T]."""
    hand_on(ctx.program, name, ctx.editor.call(aten.sub.Tensor, last_of(ctx, usual), last_of(ctx, given)))


def offset(ctx: Context, stack: str, name: str) -> Node:
    """What the prompt handed on: int64 [B, 1].

    Raises:
        CaptureError: nobody keeps it between calls.
    """
    if name in ctx.program.taken:
        return ctx.program.taken[name]
    stream = ctx.sites.stacks[stack].blocks[0].input.meta["val"]
    with ctx.program.fake_mode:
        like = torch.empty(stream.shape[0], 1, dtype=torch.int64, device=stream.device)
    return take(ctx.program, name, like, "the position of the last token before it")
