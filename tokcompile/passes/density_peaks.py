"""Merge the tokens of an image to the means of clusters around density peaks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile import counts
from tokcompile.axes import Dim
from tokcompile.editing.edit import Length
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.merging import Merging
from tokcompile.passes.select import image_tokens, is_text_axis
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence, images_per_row
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True, eq=False)
class Members:
    """Members of merged tokens, for steps that give a token several positions.

    Attributes:
        node: int64 [B, M, K], K members of each of M merged tokens, as indices into the old sequence; merged tokens are
            in the order that they have in the new one.
        axis: the old sequence: features, or a text with features among it.
        text: whether it is a text.
    """

    node: Node
    axis: Dim
    text: bool = False


def merge_by_density(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Cluster the tokens of a value, image tokens alone where text stands around them."""
    if is_text_axis(ctx, at.axis):
        return _among_text(ctx, step, place, at)
    _check_one_image(ctx, place, at)
    call, node = ctx.editor.call, place.node
    total = ctx.editor.size(node, 1)
    count = _count(ctx, step, total)
    if count is None:
        return None
    centres = _centres(ctx, step, node, count)
    labels = call(tokred.cluster_labels.default, node, centres)
    _keep_slots(ctx, step, node, centres, labels, at.axis)

    def content(source: Node) -> Node:
        weights = call(tokred.merge_weights.default, labels, source, "average")
        return call(tokred.mix_tokens.default, node, source, weights, name="merged")

    return Merging(centres, count, content, inverse=labels)


def _check_one_image(ctx: Context, place: Place, at: Sequence) -> None:
    """Refuse rows of several images: clusters are of one each, and nobody knows where it ends."""
    images = _images(ctx, at) if at.packed else 1
    if images != 1:
        raise EditError(
            "clusters need rows of one image",
            where=[place.address],
            found=f"{images} images in each row" if images else "features of all images in one sequence",
            remedy="call the model with one image in each row of the batch",
        )


def _images(ctx: Context, at: Sequence) -> int | None:
    """How many images a row of packed features holds, where that is known."""
    images = images_per_row(ctx.program, ctx.sites, at)
    projector, splice = ctx.sites.projector, ctx.sites.splice
    if images is None and projector is not None and splice is not None and projector.input.meta["val"].ndim == 3:
        return counts.images_per_row(projector.input, splice.node)
    return images


def _among_text(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Cluster the image tokens of each row; clusters stand in the first places of the image, text where it stood."""
    editor, call, node = ctx.editor, ctx.editor.call, place.node
    image, tokens = ctx.image_mask(at.axis), editor.size(node, 1)
    size = image_tokens(ctx, at.axis, tokens, "image")
    count = _count(ctx, step, size)
    if count is None:
        return None
    held = call(aten.eq.Scalar, call(aten.sum.dim_IntList, image, [1]), size)
    editor.require(held, "batch rows hold different numbers of image tokens")
    places = call(tokred.kept_indices.default, image, size)
    features = call(tokred.gather_tokens.default, node, places, 1, 0)
    centres = _centres(ctx, step, features, count)
    labels = call(tokred.cluster_labels.default, features, centres)
    _keep_slots(ctx, step, features, centres, labels, at.axis, places)

    first = call(aten.le.Scalar, call(aten.cumsum.default, image, 1), count)
    stays = call(aten.logical_or.default, call(aten.logical_not.default, image), first)
    new = editor.arithmetic(lambda n, old, made: n - (old - made), tokens, size, count)
    index = call(tokred.kept_indices.default, stays, new)
    merged = call(aten.gather.default, image, 1, index)
    middle = call(aten.gather.default, places, 1, centres)
    placed = call(aten.where.self, merged, call(tokred.splice_values.default, merged, middle, 0.0), index)
    rank = call(aten.sub.Tensor, call(aten.cumsum.default, stays, 1), 1)
    into = call(aten.gather.default, call(tokred.kept_indices.default, merged, count), 1, labels)
    into = call(tokred.splice_values.default, image, into, 0.0)
    assigned = call(aten.where.self, image, into, rank)

    def content(source: Node) -> Node:
        weights = call(tokred.merge_weights.default, assigned, source, "average")
        return call(tokred.mix_tokens.default, node, source, weights, name="merged")

    return Merging(index, new, content, inverse=assigned, placed=placed)


def _count(ctx: Context, step: Merge, size: Length) -> Length | None:
    """How many clusters a group becomes; None where each token is one."""
    count = ctx.editor.arithmetic(lambda n: ctx.instance.budget(step, n), size)
    return None if isinstance(count, int) and count == size else count


def _keep_slots(
    ctx: Context, step: Merge, node: Node, centres: Node, labels: Node, axis: Dim, places: Node | None = None
) -> None:
    """Leave a table of members under the step's name; `places` are those of the clustered tokens in the sequence."""
    if step.name is None:
        return
    table = ctx.editor.call(tokred.cluster_slots.default, node, centres, labels, int(step.slots))
    if places is not None:
        flat = ctx.editor.call(aten.flatten.using_ints, table, 1, 2)
        flat = ctx.editor.call(aten.gather.default, places, 1, flat)
        table = ctx.editor.call(aten.unflatten.int, flat, 1, [-1, int(step.slots)])
    ctx.values[step.name] = Members(table, axis, places is not None)


def _centres(ctx: Context, step: Merge, node: Node, count: Length) -> Node:
    """int64 [B, M], the tokens in the middle of the clusters, in the order of the new tokens."""
    centres = ctx.editor.call(tokred.density_peaks.default, node, count, int(step.neighbours))
    if step.order == "score":
        return centres
    like = ctx.editor.call(aten.select.int, node, -1, 0)
    chosen = ctx.editor.call(aten.zeros_like.default, like, dtype=torch.bool)
    chosen = ctx.editor.call(aten.scatter.value, chosen, 1, centres, True)
    return ctx.editor.call(tokred.kept_indices.default, chosen, count)
