"""Make tokens that a rule inserted what the model returns."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, resolve
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.slots import Slots
from tokcompile.steps import Insert

aten = torch.ops.aten
tokred = torch.ops.tokred
_NORMS = {aten.layer_norm.default, getattr(getattr(aten, "rms_norm", None), "default", None)}
_SMALLEST = 1e-12
"""Shorter vectors are divided by this, as torch.nn.functional.normalize does."""


def read_out(ctx: Context, step: Insert, owner: str, axis: Dim, slots: Slots) -> None:
    """Replace the first floating-point output by the inserted tokens after the stack's last norm.

    It becomes [B, M, C], or [B, M * C] with `flatten`; with `normalise: l2` each vector is divided by its length.

    Raises:
        EditError: the stack's last value does not hold the tokens, or the model returns no floating-point value.
    """
    stream = _normed(ctx.sites.stacks[owner].blocks[-1].output)
    if ctx.program.axes.of(stream)[1:2] != [resolve(axis)] or not isinstance(slots.count, int):
        raise EditError(
            "the inserted tokens cannot be read out",
            where=[step.at],
            found=f"the {owner} ends with {tuple(stream.meta['val'].shape)}",
            remedy="insert into the stack whose last tokens the model returns, a fixed number of tokens",
        )
    output, call = ctx.program.output, ctx.editor.call
    replaced = next((v for v in output.args[0] if _floating(v)), None)
    if replaced is None:
        raise EditError("the model returns no value that the inserted tokens could stand for", where=[step.at])
    with ctx.editor.before(output):
        places = call(tokred.kept_indices.default, slots.fresh, slots.count)
        value = call(tokred.gather_tokens.default, stream, places, 1, 0)
        if step.flatten is True:
            value = call(aten.flatten.using_ints, value, 1, 2)
        if step.normalise == "l2":
            value = _unit(ctx, value)
    output.args = (type(output.args[0])(value if each is replaced else each for each in output.args[0]),)
    ctx.log.append({"verb": "insert", "readout": str(tuple(value.meta["val"].shape)), "name": step.name})
    ctx.refresh()


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
