"""Merge the frames of each clip of a video into its first frame, all but those tokens that fit it badly."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch.fx import Node

from tokcompile.axes import Dim, product, resolve
from tokcompile.editing.edit import length_value
from tokcompile.editing.tokenmap import note
from tokcompile.errors import EditError
from tokcompile.kernels._clips import cut, emitted
from tokcompile.passes.context import Context, Selection
from tokcompile.passes.merging import Merging, tokens_of_images
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence
from tokcompile.steps import Merge

aten = torch.ops.aten
tokred = torch.ops.tokred


@dataclass(frozen=True)
class Videos:
    """How the tokens of a row are those of the frames of videos.

    Attributes:
        count: videos of a row.
        frames: of each.
        cells: tokens of each frame.
        before, after: other tokens of each video.
    """

    count: int
    frames: int
    cells: int
    before: int
    after: int

    @property
    def tokens(self) -> int:
        """Tokens of a video."""
        return self.before + self.frames * self.cells + self.after


def merge_clips(ctx: Context, step: Merge, place: Place, at: Sequence) -> Merging | None:
    """Of each clip keep the step's selection of the first frame, of later frames what fits it badly, and the merged.

    The other tokens of the selection are poured into those of the first frame, frame by frame, and this stands at the
    clip's end once more. Tokens that are not of the selection are dropped.

    Returns:
        None for a selection of everything.
    """
    tokens_of_images(ctx, place, at)
    chosen = ctx.values[step.keep]
    videos = _videos(ctx, chosen, place, at)
    if length_value(chosen.count) == length_value(chosen.size):
        return None
    each, clip = int(chosen.count), int(step.clip)
    if each == 0:
        raise EditError(
            "clips are merged into the chosen tokens of their first frame, and none are chosen",
            where=[place.address],
            found=f"0 of {videos.cells} tokens of each frame",
            remedy="choose at least one token of each frame",
        )
    count = staying(step.ratio, each)
    _check_room(videos, each, count, clip, place)
    editor, call, node = ctx.editor, ctx.editor.call, place.node
    options = (float(step.spread), float(step.temperature), int(step.iterations))

    rows = call(aten.reshape.default, node, [-1, videos.tokens, node.meta["val"].shape[-1]])
    rows = call(aten.slice.Tensor, rows, 1, videos.before, videos.before + videos.frames * videos.cells)
    rows = call(aten.reshape.default, rows, [-1, videos.cells, node.meta["val"].shape[-1]])
    cells = call(tokred.kept_indices.default, chosen.mask, each, name="cells")
    note(editor, cells)
    x = call(tokred.gather_tokens.default, rows, cells, 1, 0)
    x = call(aten.reshape.default, x, [-1, videos.frames, each, node.meta["val"].shape[-1]])
    stays = _noted(ctx, call(tokred.clip_stays.default, x, clip, count, *options), videos.frames, each, clip, count)
    places = call(aten.reshape.default, cells, [-1, videos.frames, each])
    places = call(tokred.clip_source.default, places, stays, videos.cells, clip, count)
    index = _of_rows(ctx, places, videos)

    def content(source: Node) -> Node:
        picked = call(tokred.gather_tokens.default, node, source, 1, 0)
        more = (videos.count, videos.before, clip, count, *options)
        return call(tokred.merge_clips.default, picked, x, stays, *more, name="merged")

    return Merging(index, index.meta["val"].shape[1], content)


def staying(ratio: Fraction, each: int) -> int:
    """How many of the chosen tokens of a later frame stay: ceil(ratio * (each - 1)).

    As many as are below the quantile `ratio` of a frame's values, interpolated linearly, if no two are alike.
    """
    ratio = Fraction(ratio)
    return -(-ratio.numerator * (each - 1) // ratio.denominator)


def _videos(ctx: Context, chosen: Selection, place: Place, at: Sequence) -> Videos:
    """Find frames among the tokens of a row, by the images that the projector reads.

    Features of a row are those of its videos in turn, each with the features of its frames in turn, all together or as
    one segment of what a video is joined of.

    Raises:
        EditError: that is not how the tokens at the place are made, or the selection is among others.
    """
    projector, rows = ctx.sites.projector, resolve(at.rows)
    images = ctx.program.axes.of(projector.input)[0] if projector is not None and projector.rows else ()
    axis, before, after = resolve(at.axis), 0, 0
    inside = images[len(rows) :] if images[: len(rows)] == rows else ()
    joined = axis[-1].segments if axis else None
    outer: Dim = ()
    if joined is not None:
        outer, parts = axis[:-1], [resolve(part) for part in joined]
        frames = inside[len(outer) :] if inside[: len(outer)] == outer else ()
        spot = next((i for i, part in enumerate(parts) if frames and part[: len(frames)] == frames), None)
        axis = parts[spot] if spot is not None else ()
        before, after = (sum(_length(part) for part in side) for side in (parts[: spot or 0], parts[(spot or 0) + 1 :]))
    else:
        frames = inside if len(inside) == 1 and axis[:1] == inside else ()
    cells = axis[len(frames) :]
    if not frames or resolve(chosen.axis) != cells or chosen.group is not None:
        raise EditError(
            "clips are merged where each row holds the frames of videos, by a selection among the tokens of each frame",
            where=[place.address],
            found=f"{product(resolve(at.axis))} tokens in a row, a selection among {length_value(chosen.size)}",
            remedy="merge at projector.output of a model that is given videos, with a selection `by: pooled`",
        )
    return Videos(_length(outer), _length(frames), _length(cells), before, after)


def _length(dim: Dim) -> int:
    size = product(resolve(dim))
    if isinstance(size, int):
        return size
    raise EditError(
        "the number of frames is not known when the graph is compiled",
        found=str(size),
        remedy="compile with videos of a static number of frames",
    )


def _check_room(videos: Videos, each: int, count: int, clip: int, place: Place) -> None:
    """Refuse clips that would become longer than they are: the first frame is there twice."""
    for _, _, length in cut(videos.frames, clip):
        new, old = emitted(count, length, each), length * videos.cells
        if new > old:
            raise EditError(
                "a clip would become longer by merging its frames, as it ends with its first frame once more",
                where=[place.address],
                found=f"{new} tokens of {length} frames of {videos.cells}",
                remedy=f"choose fewer than {each} tokens of each frame, or a smaller `ratio`",
            )


def _noted(ctx: Context, stays: Node, frames: int, each: int, clip: int, count: int) -> Node:
    """A choice among the tokens of frames, bool [N, F, m], as what a recording holds and a replay gives back."""
    call = ctx.editor.call
    flat = call(aten.reshape.default, stays, [-1, frames * each])
    total = sum(number * (each + (length - 1) * count) for _, number, length in cut(frames, clip))
    kept = call(tokred.kept_indices.default, flat, total, name="stays")
    note(ctx.editor, kept)
    flat = call(aten.scatter.value, call(aten.zeros_like.default, flat), 1, kept, True)
    return call(aten.reshape.default, flat, [-1, frames, each])


def _of_rows(ctx: Context, places: Node, videos: Videos) -> Node:
    """int64 [B, T'] of the places in each video's frames [B * videos, n], with its other tokens, which all stay."""
    call, device = ctx.editor.call, places.meta["val"].device

    def others(start: int, end: int) -> list[Node]:
        numbers = call(aten.arange.start, start, end, device=device)
        return [call(aten.expand.default, numbers, [ctx.editor.size(places, 0), end - start])] if start < end else []

    frames = call(aten.add.Tensor, places, videos.before)
    behind = others(videos.tokens - videos.after, videos.tokens)
    joined = call(aten.cat.default, [*others(0, videos.before), frames, *behind], 1)
    new = joined.meta["val"].shape[1]
    first = call(aten.mul.Tensor, call(aten.arange.default, videos.count, device=device), videos.tokens)
    wide = call(aten.reshape.default, joined, [-1, videos.count, new])
    wide = call(aten.add.Tensor, wide, call(aten.unsqueeze.default, first, 1))
    return call(aten.reshape.default, wide, [-1, videos.count * new])
