"""Make tokens that a rule inserted what the model returns."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.editing.tokenmap import TokenMap
from tokcompile.editing.transport import Transport
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.insertplaces import Slots
from tokcompile.steps import Insert

aten = torch.ops.aten
tokred = torch.ops.tokred
_NORMS = {aten.layer_norm.default, getattr(getattr(aten, "rms_norm", None), "default", None)}
_SMALLEST = 1e-12
"""Shorter vectors are divided by this, as torch.nn.functional.normalize does."""


def read_out(ctx: Context, step: Insert, owner: str, content: Node, slots: Slots) -> None:
    """Replace the first floating-point output by the inserted tokens after the stack's last norm.

    It becomes [B, M, C], or [B, M * C] with `flatten`; with `normalise: l2` each vector is divided by its length.

    Where nothing else is returned, old tokens end with the last attention.

    Raises:
        EditError: the stack's last value does not hold the tokens, or the model returns no floating-point value.
    """
    stream = _normed(ctx.sites.stacks[owner].blocks[-1].output)
    if ctx.program.axes.of(stream)[1:2] != ctx.program.axes.of(content)[1:2] or not isinstance(slots.count, int):
        raise EditError(
            "the inserted tokens cannot be read out",
            where=[step.at],
            found=f"the {owner} ends with {tuple(stream.meta['val'].shape)}",
            remedy="insert into the stack whose last tokens the model returns, a fixed number of tokens",
        )
    output = ctx.program.output
    replaced = next((v for v in output.args[0] if _floating(v)), None)
    if replaced is None:
        raise EditError("the model returns no value that the inserted tokens could stand for", where=[step.at])
    spots = [i for i, each in enumerate(output.args[0]) if each is replaced]
    _return(ctx, spots, stream)
    if _used_later(ctx, step) or not _shortened(ctx, owner, slots, content):
        with ctx.editor.before(output):
            places = ctx.editor.call(tokred.kept_indices.default, slots.fresh, slots.count)
            stream = ctx.editor.call(tokred.gather_tokens.default, stream, places, 1, 0)
    with ctx.editor.before(output):
        value = stream
        if step.flatten is True:
            value = ctx.editor.call(aten.flatten.using_ints, value, 1, 2)
        if step.normalise == "l2":
            value = _unit(ctx, value)
    _return(ctx, spots, value)
    ctx.log.append({"verb": "insert", "readout": str(tuple(value.meta["val"].shape)), "name": step.name})
    ctx.refresh()


def _return(ctx: Context, spots: list[int], value: Node) -> None:
    """Let the graph return a value at some places of its outputs."""
    own = ctx.program.output.args[0]
    ctx.program.output.args = (type(own)(value if i in spots else each for i, each in enumerate(own)),)


def _used_later(ctx: Context, step: Insert) -> bool:
    """Whether other steps may read what was made of all tokens."""
    return bool(ctx.values.keys() - {step.name}) or any(
        getattr(other, "of", None) == step.name for other in ctx.instance.steps
    )


def _shortened(ctx: Context, owner: str, slots: Slots, content: Node) -> bool:
    """Go on with the inserted tokens alone after the last attention, where nothing else is returned of what follows.

    Old tokens are still its keys and values; the feed-forward and the norms are of no more tokens than are read out.
    """
    ctx.program.graph.eliminate_dead_code()
    ctx.refresh()
    middle, reach = ctx.sites.stacks[owner].blocks[-1].middle, ctx.sites.reach
    dims = ctx.program.axes.of(middle)
    held = [v for v in ctx.program.output.all_input_nodes if reach.above(middle, v)]
    if len(held) != 1 or len(dims) != 3 or dims[1:2] != ctx.program.axes.of(content)[1:2]:
        return False
    with ctx.editor.after([middle, slots.fresh]):
        source = ctx.editor.call(tokred.kept_indices.default, slots.fresh, slots.count)
    old = ctx.editor.size(middle, 1)
    token_map = TokenMap(dims[1], dims[0], source, slots.fresh, old, slots.count)
    Transport(ctx.editor, ctx.sites).apply(middle, token_map)
    ctx.refresh()
    return True


def _normed(stream: Node) -> Node:
    return next((u for u in stream.users if u.target in _NORMS), stream)


def _floating(value: object) -> bool:
    held = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(held, torch.Tensor) and held.dtype.is_floating_point


def _unit(ctx: Context, value: Node) -> Node:
    call = ctx.editor.call
    squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, value, value), [-1], True)
    length = call(aten.clamp.default, call(aten.sqrt.default, squares), _SMALLEST)
    return call(aten.div.Tensor, value, length)
