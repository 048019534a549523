"""Keep some tokens, and merge all others to a few that are spread evenly among them."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, resolve
from tokcompile.axes.context import arg
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, class_tokens, oldest
from tokcompile.passes.merging import Merging, tokens_of_images
from tokcompile.program import place as node_place
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred
_UNCHANGED = {aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default}


def nearest(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Tokens that stay, in the order of their places, and then those to which each of the others is most alike.

    With `lead` the class tokens that the model leaves out come before them; they stand for tokens that are merged.

    Returns:
        None where no more tokens would be merged than are left.
    """
    tokens, count, editor = tokens_of_images(ctx, place, at), int(step.count), ctx.editor
    chosen = ctx.values[step.keep]
    stay = int(chosen.count)
    if resolve(chosen.axis) != resolve(at.axis):
        raise EditError(
            "the tokens that stay were chosen among others than those that are merged",
            where=[node_place(place.node)],
            found=f"a choice from {chosen.size} tokens; the sequence here holds {tokens}",
            remedy="choose among the tokens at the place of the merge, as earlier steps left them",
        )
    if stay + count >= tokens:
        return None
    keep = chosen.mask
    others = editor.call(aten.logical_not.default, keep)
    targets = editor.call(tokred.strided_tokens.default, others, count)
    keys = _compared(ctx, ctx.values[step.like].node, at.axis)
    joined = editor.call(tokred.nearest_tokens.default, keys, targets, others)
    rank = editor.call(aten.sub.Tensor, editor.call(aten.cumsum.default, keep, 1), 1)
    slots = editor.call(aten.where.self, keep, rank, editor.call(aten.add.Tensor, joined, stay))
    index = editor.call(aten.cat.default, [editor.call(tokred.kept_indices.default, keep, stay), targets], 1)
    whole, lead = _with_class_tokens(ctx, place, at.axis) if step.lead else (place.node, 0)
    stands = index
    if lead:
        first = editor.call(aten.arange.default, lead, device=slots.meta["val"].device)
        first = editor.call(aten.expand.default, first, [editor.size(slots, 0), lead])
        slots, index = (_after(ctx, first, value, lead) for value in (slots, index))
        spare = editor.call(aten.scatter.value, others, 1, targets, False)
        spare = editor.call(tokred.kept_indices.default, spare, lead)
        stands = editor.call(aten.cat.default, [spare, stands], 1)
    weights = editor.call(tokred.merge_weights.default, slots, index, step.content)

    def content(source: Node) -> Node:
        return editor.call(tokred.mix_tokens.default, whole, source, weights, name="merged")

    return Merging(stands, lead + stay + count, content)


def _after(ctx: Context, first: Node, value: Node, lead: int) -> Node:
    """Numbers of tokens among which others come first."""
    return ctx.editor.call(aten.cat.default, [first, ctx.editor.call(aten.add.Tensor, value, lead)], 1)


def _compared(ctx: Context, keys: Node, axis: Dim) -> Node:
    """What tokens are compared by, [B, T, D]: keys [B, H, T, D] are brought together by their mean over heads."""
    tokens = ctx.program.axes.of(keys)[-2]
    if keys.meta["val"].ndim == 4:
        keys = ctx.editor.call(aten.mean.dim, keys, [1])
    return ctx.align(keys, tokens, axis)


def _with_class_tokens(ctx: Context, place: Place, axis: Dim) -> tuple[Node, int]:
    """The value that the model takes its patches from, and how many class tokens are in front of these.

    Raises:
        EditError: class tokens are among the features, or are left out in a way that does not say which they are.
    """
    start = oldest(axis)
    if len(start) == 1 and start[0].segments:
        raise EditError(
            "class tokens are among the features, and would be merged like these",
            where=[node_place(place.node)],
            remedy="leave `lead` out, or load the model so that it leaves class tokens out",
        )
    if not class_tokens(ctx.program, ctx.sites):
        return place.node, 0
    node = place.node
    while node.target in _UNCHANGED:
        node = node.args[0]
    if node.target is aten.slice.Tensor and arg(node, 1, "dim", 0) == 1:
        whole, lead = node.args[0], arg(node, 2, "start", 0)
        before = ctx.program.axes.of(whole)[1]
        if len(before) == 1 and before[0].segments and resolve(before[0].segments[-1]) == resolve(axis):
            return whole, int(lead)
    raise EditError(
        "class tokens are left out before this place in a way that does not say where they are",
        where=[node_place(place.node)],
        found=f"'{node.target}'",
        remedy="merge at projector.input, where the model slices its patches, or leave `lead` out",
    )
