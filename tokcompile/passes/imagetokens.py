"""How many image tokens the rows of a text have, as the splice put them there and earlier edits left them."""

from __future__ import annotations

from math import prod

from torch.fx import Node

from tokcompile.axes import Dim
from tokcompile.counts import count, images_per_row
from tokcompile.editing.edit import Length
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.sites.projector import Projector
from tokcompile.sites.splice import Splice


def image_tokens(ctx: Context, axis: Dim, total: Length, per: str) -> Length:
    """Image tokens per row on a text axis: what the splice put there, less what was dropped since.

    Raises:
        EditError: rows cannot have as many each, or are to hold one image (`per` is `image`), and that is not known.
    """
    splice = ctx.sites.splice
    projector = ctx.sites.projector
    # Features that were handed out row by row are joined to a length that only the model knows.
    counted = splice.features if projector is None or not _unknown(splice.features) else projector.input
    features = [counted, *(each.features for each in splice.further)]
    spliced = sum(prod(count(node, dim) for dim in range(node.meta["val"].ndim - 1)) for node in features)
    rows = count(splice.node, 0)
    if spliced % rows:
        raise EditError("image tokens do not divide evenly among batch rows", found=f"{spliced} in {rows} rows")
    if per == "image":
        _check_one_image(projector, splice)
    marks = ctx.marks(axis)
    if marks:
        return _images_left(ctx, marks, total)
    sizes = (total, ctx.inserted_tokens(axis), ctx.editor.size(splice.node, 1))
    return ctx.editor.arithmetic(lambda now, more, then: spliced // rows - (then + more - now), *sizes)


def _images_left(ctx: Context, marks: list[Node], total: Length) -> Length:
    """Image tokens per row after a mark: those that it kept, less what was dropped since. Markers are none."""
    slots = marks[-1]
    kept = slots.meta.get("kept")
    if kept is None:
        raise EditError(
            "how many image tokens are left depends on the data",
            found="an earlier mark that leaves short runs as they are",
            remedy="use `min_run: 1`, or choose among all",
        )
    return ctx.editor.arithmetic(lambda held, then, now: held - (then - now), kept, ctx.editor.size(slots, 1), total)


def unknown_images(images: int | None) -> EditError:
    return EditError(
        "a budget per image needs the images' own axis",
        found=f"{images} images in each row" if images else "features of all images in one sequence",
        remedy="use `per: row`, or select at projector.input where it has an axis for images",
    )


def _check_one_image(projector: Projector | None, splice: Splice) -> None:
    """Refuse a budget per image where a row may hold several: on a text axis nobody knows where one ends."""
    counted = projector is not None and projector.rows and not splice.further
    images = images_per_row(projector.input, splice.node) if counted else None
    if images != 1:
        raise unknown_images(images)


def _unknown(node: Node) -> bool:
    return any(not isinstance(s, int) and s.node.hint is None for s in node.meta["val"].shape)
