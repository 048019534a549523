"""Merge each cluster of tokens that point in like directions to their mean."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.passes.context import Context
from tokcompile.passes.merging import Merging, tokens_of_images
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


def kmeans(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Replace tokens by the means of as many clusters as the step asks for, in the order of the clusters' numbers.

    A cluster stands for its first token; one without tokens is a zero vector.

    Returns:
        None where there are no more tokens than clusters.
    """
    count = int(step.count)
    if count >= tokens_of_images(ctx, place, at):
        return None
    editor, node = ctx.editor, place.node
    labels = editor.call(tokred.kmeans_assign.default, node, count, int(step.iterations), int(step.seed))
    index = editor.call(tokred.first_members.default, labels, count)
    weights = editor.call(tokred.merge_weights.default, labels, index, "average")
    if step.normalise:
        weights = editor.call(aten.div.Tensor, weights, _lengths(ctx, node))

    def content(source: Node) -> Node:
        return editor.call(tokred.mix_tokens.default, node, source, weights, name="merged")

    return Merging(index, count, content)


def _lengths(ctx: Context, node: Node) -> Node:
    """float32 [B, 1, T]: the length of each token's vector, 1 for a zero vector."""
    length = ctx.editor.call(tokred.token_norm.default, node, 2.0)
    zero = ctx.editor.call(aten.eq.Scalar, length, 0)
    return ctx.editor.call(aten.unsqueeze.default, ctx.editor.call(aten.masked_fill.Scalar, length, zero, 1.0), 1)
