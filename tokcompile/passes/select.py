"""select: choose tokens."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.counts import images_per_row
from tokcompile.editing.edit import Length, length_value, sub
from tokcompile.errors import EditError
from tokcompile.passes.context import Context, Scores, Selection, longest_segment
from tokcompile.passes.diverse import compared_scores, refuse_folds, walk
from tokcompile.passes.fold import scores_of_features
from tokcompile.passes.imagetokens import image_tokens, unknown_images
from tokcompile.passes.keychoice import choose_keys
from tokcompile.passes.keyscores import KeyScores
from tokcompile.passes.pooled import select_pooled, sources
from tokcompile.passes.width import grid_width
from tokcompile.sites.features import features, find_fold, sequence
from tokcompile.sites.features import images_per_row as packed_images
from tokcompile.sites.grid import patch_grid
from tokcompile.steps import Select

aten = torch.ops.aten
tokred = torch.ops.tokred
LOWEST = float("-inf")
CROSS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
SQUARE = tuple((y, x) for y in (-1, 0, 1) for x in (-1, 0, 1))


def select(ctx: Context, step: Select) -> None:
    """Insert the computation of one selection: a bool mask with an exact count per row."""
    if isinstance(ctx.values.get(step.scores or ""), KeyScores):
        choose_keys(ctx, step)
        return
    ways = {"topk": _topk, "fill": _topk, "diverse": _topk, "neighbours": _neighbours, "protect": _protect}
    ways["pooled"] = select_pooled
    with ctx.editor.after(_sources(ctx, step)):
        made = ways[step.by](ctx, step)
    made.mask.meta["selection"] = step.name
    ctx.values[step.name] = made
    ctx.log.append(
        {"verb": "select", "name": step.name, "by": step.by, "of": _plain(made.size), "count": _plain(made.count)}
    )


def _plain(length: Length) -> int | str:
    value = length_value(length)
    return value if isinstance(value, int) else str(value)


def _sources(ctx: Context, step: Select) -> list[Node]:
    nodes = [ctx.values[name].node for name in (step.scores, step.like) if name]
    nodes += [ctx.values[name].mask for name in (step.of, *step.first) if name]
    if step.among != "all" and ctx.sites.splice is not None and _is_text(ctx, step):
        nodes += [splice.mask for splice in ctx.sites.splice.all]
    if step.by == "diverse":
        nodes += ctx.sites.paddings.values()
    text = ctx.sites.text_stack()
    if step.by == "protect" and text is not None:
        nodes.append(text[1].blocks[0].input)
    if step.by == "pooled":
        nodes += sources(ctx)
    return nodes or [ctx.program.output.prev]


def _is_text(ctx: Context, step: Select) -> bool:
    if step.like is not None:
        at = sequence(ctx.program, ctx.sites, ctx.values[step.like].node)
        return at is not None and is_text_axis(ctx, at.axis)
    return step.scores is not None and is_text_axis(ctx, ctx.values[step.scores].axis)


def is_text_axis(ctx: Context, axis: Dim) -> bool:
    """Whether an axis is the sequence of a decoder or an encoder, as it was or after cuts."""
    name = ctx.stack_of(axis)
    return name is not None and not name.startswith("vision")


def patch_axis(ctx: Context, axis: Dim) -> Dim:
    """The patches of a vision sequence: the sequence without its class and register tokens."""
    axis, made = resolve(axis), features(ctx.program, ctx.sites)
    if made is not None and made.axis and (made.axis == axis or _holds_segment(axis, made.axis)):
        return made.axis
    if ctx.sites.splice is not None:
        spliced = sequence(ctx.program, ctx.sites, ctx.sites.splice.offered)
        if spliced is not None and spliced.axis == axis:
            return axis
    return longest_segment(axis) if len(axis) == 1 and axis[0].segments else axis


def _holds_segment(axis: Dim, segment: Dim) -> bool:
    axis = resolve(axis)
    return len(axis) == 1 and any(resolve(s) == segment for s in axis[0].segments or ())


def _group(ctx: Context, step: Select, scores: Scores) -> tuple[Node, Dim, Node | None, Length]:
    """Scores on the axis that is chosen from, that axis, the tokens up for choice, and how many they are per row."""
    if not is_text_axis(ctx, scores.axis):
        if scores.owner and not scores.owner.startswith("vision"):
            raise EditError(
                f"no {'' if step.among == 'all' else step.among + ' '}tokens of the {scores.owner} were scored",
                found="attention to another sequence than its own",
                remedy="score a block that attends to its own sequence, or the tokens of that other sequence",
            )
        return _vision_group(ctx, step, scores)
    node, axis = scores.node, scores.axis
    total = ctx.editor.size(node, 1)
    valid = ctx.valid_mask(axis)
    if valid is not None:  # padding is up for choice in `all` and `text`, after every real token
        lowest = ctx.editor.call(aten.full_like.default, node, LOWEST)
        node = ctx.editor.call(aten.where.self, valid, node, lowest)
    if step.among == "all":
        return node, axis, None, total
    image = ctx.image_mask(axis)
    size = image_tokens(ctx, axis, total, step.per)
    if step.among == "image":
        return node, axis, image, size
    text = ctx.editor.call(aten.logical_not.default, image)
    return node, axis, text, ctx.editor.arithmetic(sub, total, size)


def _vision_group(ctx: Context, step: Select, scores: Scores) -> tuple[Node, Dim, Node | None, Length]:
    axis = patch_axis(ctx, scores.axis)
    node = ctx.align(scores.node, scores.axis, axis)
    fold = find_fold(ctx.program, ctx.sites, axis)
    if fold is not None:
        node, axis = scores_of_features(ctx.editor, node, fold), fold.features
    size = _count(axis)
    _check_budget(ctx, step, node, axis)
    if fold is not None:
        return node, axis, None, size
    patches = ctx.patch_mask(node, axis)
    if patches is None:
        return node, axis, None, size
    mask, others = patches
    return node, axis, mask, size - others


def _count(axis: Dim) -> int:
    size = product(resolve(axis))
    if not isinstance(size, int):
        raise EditError(
            "the number of image tokens is not known when the graph is compiled",
            found=str(size),
            remedy="compile with a static image size",
        )
    return size


def _check_budget(ctx: Context, step: Select, scores: Node, axis: Dim) -> None:
    """Refuse a budget of what is not a row of these scores: of an image where that is a batch row, or the other way."""
    if ctx.sites.splice is None:
        return
    spliced = sequence(ctx.program, ctx.sites, ctx.sites.splice.offered)
    for packed in (features(ctx.program, ctx.sites), spliced):
        if packed is not None and packed.packed and packed.axis == axis:
            images = packed_images(ctx.program, ctx.sites, packed) if step.per == "image" else 1
            if images != 1:
                raise unknown_images(images)
            return
    images = images_per_row(scores, ctx.sites.splice.node) if step.per == "row" else 1
    if images != 1:
        raise EditError(
            "a budget per row needs the images of a row in one sequence",
            found=f"{images} images in each row, with scores of their own",
            remedy="use `per: image`, or select at decoder.0.input",
        )


def _topk(ctx: Context, step: Select) -> Selection:
    scores = compared_scores(ctx, step) if step.by == "diverse" else ctx.values[step.scores]
    if step.by == "diverse" and not is_text_axis(ctx, scores.axis):
        refuse_folds(ctx, step, patch_axis(ctx, scores.axis))
    node, axis, group, size = _group(ctx, step, scores)
    count = ctx.editor.arithmetic(lambda n: ctx.instance.budget(step, n), size)
    if isinstance(count, int) and count == 0:  # the scores are then read by nobody, and are not computed
        mask = ctx.editor.call(aten.zeros_like.default, node, dtype=torch.bool)
    elif step.by == "diverse":
        mask = walk(ctx, step, scores, axis, group, count)
    elif int(step.windows) > 1:
        return _by_window(ctx, step, node, axis, size, count)
    elif step.by == "topk":
        mask = ctx.editor.call(tokred.topk_mask.default, node, group, count)
    else:
        first = [_on(ctx, ctx.values[name], axis) for name in step.first]
        mask = ctx.editor.call(tokred.fill_mask.default, first, node, group, count)
    return Selection(mask, axis, group, size, count, step.among)


def _by_window(ctx: Context, step: Select, scores: Node, axis: Dim, size: Length, budget: Length) -> Selection:
    """The best of each window of the patch grid; what does not divide among the windows is lost."""
    grid, side = patch_grid(ctx.program, axis), int(step.windows)
    if grid is None or any(length % side for length in grid):
        raise EditError(
            f"{side} x {side} windows of one size need a patch grid that they divide",
            found="a sequence without one" if grid is None else f"a grid of {grid[0]} x {grid[1]}",
            remedy="choose another number of windows, on the vision side, before tokens are dropped",
        )
    count = ctx.editor.arithmetic(lambda n: n // (side * side), budget)
    mask = ctx.editor.call(tokred.window_topk_mask.default, scores, *grid, side, side, count)
    return Selection(mask, axis, None, size, ctx.editor.arithmetic(lambda n: n * side * side, count))


def _on(ctx: Context, selection: Selection, axis: Dim) -> Node:
    return ctx.align(selection.mask, selection.axis, axis, fill=0.0)


def _neighbours(ctx: Context, step: Select) -> Selection:
    of = ctx.values[step.of]
    offsets = {"cross": CROSS, "square": SQUARE}.get(step.offsets, step.offsets)
    ys, xs = [y for y, _ in offsets], [x for _, x in offsets]
    grid = patch_grid(ctx.program, of.axis)
    width = grid_width(ctx, of.axis) if grid is None else None
    if grid is not None:
        mask = ctx.editor.call(tokred.dilate.default, of.mask, ys, xs, *grid, step.edges)
    elif width is not None:
        mask = ctx.editor.call(tokred.dilate_by_width.default, of.mask, ys, xs, width, step.edges)
    else:
        raise EditError(
            "neighbours need the patch grid",
            found=f"a sequence of {product(resolve(of.axis))} tokens without one",
            remedy="choose neighbours on the vision side, before tokens are dropped",
        )
    return Selection(mask, of.axis, of.group, of.size, of.count, of.kind)


def _protect(ctx: Context, step: Select) -> Selection:
    """The first or last real token of each text row."""
    text = ctx.sites.text_stack()
    if text is None:
        raise EditError("protect needs a text sequence", remedy="class tokens of a vision stack are never dropped")
    start = text[1].blocks[0].input
    axis = ctx.program.axes.of(start)[1]
    valid = ctx.valid_mask(axis)
    if valid is None:
        like = ctx.editor.call(aten.select.int, start, -1, 0)
        valid = ctx.editor.call(aten.ones_like.default, like, dtype=torch.bool)
    chosen = []
    for end in step.protect:
        seen = ctx.editor.call(aten.flip.default, valid, [1]) if end == "last" else valid
        seen = ctx.editor.call(aten.cumsum.default, seen, 1)
        seen = ctx.editor.call(aten.flip.default, seen, [1]) if end == "last" else seen
        only = ctx.editor.call(aten.eq.Scalar, seen, 1)
        chosen.append(ctx.editor.call(aten.logical_and.default, only, valid))
    mask = chosen[0]
    for other in chosen[1:]:
        mask = ctx.editor.call(aten.logical_or.default, mask, other)
    return Selection(mask, axis, None, ctx.editor.size(start, 1), len(step.protect), "all")
