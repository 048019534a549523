"""Choose those features that a model pools from the most patches of a selection."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import product, resolve
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, Selection
from tokcompile.program import place, tensor
from tokcompile.sites.pooling import Pooling
from tokcompile.steps import Select

aten = torch.ops.aten
tokred = torch.ops.tokred
_SHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_AVERAGES = {
    aten.permute.default,
    aten.transpose.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_bicubic2d.default,
    aten.upsample_bicubic2d.vec,
}
"""Operators that do the same with every channel: what they make of one channel alone is what they make of it here."""


def sources(ctx: Context) -> list[Node]:
    """What a choice among pooled features reads beside the selection."""
    return [ctx.sites.pooling.pooled] if ctx.sites.pooling is not None else []


def select_pooled(ctx: Context, step: Select) -> Selection:
    """Pool a selection of patches as the model pools these, and choose the features with the largest shares.

    The selection is 1 for a chosen patch and 0 for each other, as float32. The lower index wins a tie.
    """
    of, pooling = ctx.values[step.of], ctx.sites.pooling
    if pooling is None:
        raise EditError(
            "no features that the model pools from the patches of each image",
            where=[f"select {step.name}"],
            found="a projector that reads the patches of all images in one sequence, or none",
            remedy="choose by scores instead",
        )
    axes = ctx.program.axes
    patches, features = (axes.of(node)[1] for node in (pooling.patches, pooling.pooled))
    if resolve(of.axis) != patches or of.group is not None:
        raise EditError(
            "pooled features are chosen by a selection of the patches that they are made of",
            where=[place(pooling.pooled)],
            found=f"a selection among {product(resolve(of.axis))} tokens; {product(patches)} patches are pooled",
            remedy="select image tokens of the vision stack, all of one image's, before any are dropped",
        )
    shares = _pooled(ctx, of.mask, pooling)
    count = ctx.instance.budget(step, product(features))
    like = ctx.editor.call(aten.select.int, pooling.pooled, -1, 0)
    every = ctx.editor.call(aten.ones_like.default, like, dtype=torch.bool)
    mask = ctx.editor.call(tokred.topk_mask.default, shares, every, count)
    return Selection(mask, features, None, product(features), count)


def _pooled(ctx: Context, mask: Node, pooling: Pooling) -> Node:
    """float32 [images, N'] of a mask [images, N]: the share of each feature that comes from chosen patches."""
    value = ctx.editor.call(aten.unsqueeze.default, ctx.editor.call(aten.to.dtype, mask, torch.float32), -1)
    last, channels = pooling.patches, ctx.program.axes.of(pooling.patches)[-1]
    for node in pooling.between:
        if [n for n in node.all_input_nodes if tensor(n)] != [last] or node.target not in {*_SHAPES, *_AVERAGES}:
            raise EditError(
                "the model does not pool each channel alone, so a selection of patches cannot be pooled as they are",
                where=[place(node)],
                found=f"'{node.target}' between the patches and the features of their image",
                remedy="choose pooled features by scores",
            )
        value, last = ctx.editor.clone(node, {last: value}, _of_one_channel(ctx, node, channels)), node
    return ctx.editor.call(aten.squeeze.dim, value, -1)


def _of_one_channel(ctx: Context, node: Node, channels: Any) -> list[Any]:
    """Arguments of an operator with 1 in place of the number of channels."""
    args = list(node.args)
    if node.target in _SHAPES:
        dims = ctx.program.axes.of(node)
        args[1] = [1 if dim == channels else size for dim, size in zip(dims, args[1], strict=True)]
    return args
