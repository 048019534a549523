"""layer, gated: a learned gated projector takes the place of the model's own."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.learned import Learned
from tokcompile.program import SIZES
from tokcompile.program import place as node_place
from tokcompile.sites import resolve_address
from tokcompile.sites.projector import projected_features
from tokcompile.steps import Layer

aten = torch.ops.aten


def gate(ctx: Context, step: Layer, record: dict[str, object]) -> None:
    """y = (SiLU(x W1) * (x W2)) W3 of normalised features x, in place of what the model makes of them.

    SwiGLU (Shazeer 2020) as "TokenFLEX" (2025) has it in front of a language model. The features are
    [B, N, C], or [n, C] of all images in one; what follows reads y where it read the model's own projection, which
    nothing computes any more. No parameter depends on how many features there are.

    Raises:
        AddressError: the graph has no projector.
        EditError: the model's projector makes other tokens of the features, or puts them in another order.
    """
    place = resolve_address(ctx.sites, step.at)
    record["mlp"] = step.mlp
    if step.mlp == "keep":
        record["note"] = "the model's own projector: no edit"
        return
    node = place.node
    output = _projection(ctx, node)
    call, made = ctx.editor.call, output.meta["val"]
    with ctx.editor.after([node]):
        learned = Learned(ctx.editor, step.name, node, float(step.std))
        x = learned.norm(step.norm, node)
        width, bias = int(made.shape[-1]), step.bias is True
        hidden = width if step.width is None else int(step.width)
        gated = call(aten.silu.default, learned.linear("gate", x, hidden, bias=bias))
        y = call(aten.mul.Tensor, gated, learned.linear("up", x, hidden, bias=bias))
        y = learned.linear("down", y, width, bias=bias)
        y = _in_form(ctx, y, output)
    for user in [u for u in output.users if u.target not in SIZES]:
        ctx.editor.swap_input(user, output, y)
    record |= {"width": hidden, "parameters": learned.size}
    ctx.refresh()


def _projection(ctx: Context, node: Node) -> Node:
    """What stands for the model's own projection of each feature: all else that a projector does would be lost."""
    output = ctx.sites.projector.output
    found = projected_features(ctx.sites.projector, ctx.program.axes, ctx.sites.reach)
    if found is not None and all(isinstance(each.meta["val"].shape[-1], int) for each in (node, found)):
        return found
    raise EditError(
        "the model's projector makes other tokens of the features that it reads, and a layer in its place would not",
        where=[node_place(node), node_place(output)],
        found=f"{tuple(node.meta['val'].shape)} in, and {tuple(output.meta['val'].shape)} out",
        remedy="use it on a model whose projector maps each feature by itself, and before steps that merge its output",
    )


def _in_form(ctx: Context, y: Node, output: Node) -> Node:
    """y in the rank and dtype of the model's projection."""
    call, made = ctx.editor.call, output.meta["val"]
    rank = y.meta["val"].ndim
    if rank > made.ndim:
        y = call(aten.flatten.using_ints, y, 0, rank - made.ndim)
    elif rank < made.ndim:
        y = call(aten.reshape.default, y, [*(ctx.editor.size(output, i) for i in range(made.ndim - 1)), made.shape[-1]])
    return y if y.meta["val"].dtype == made.dtype else call(aten.to.dtype, y, made.dtype)
