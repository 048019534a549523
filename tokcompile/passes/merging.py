"""What the ways to merge tokens share: the result that each gives, and what each asks of the place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from tokcompile.axes import product, resolve
from tokcompile.editing.edit import Length
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.select import is_text_axis
from tokcompile.program import place as node_place
from tokcompile.sites import Place
from tokcompile.sites.features import Sequence


@dataclass(frozen=True, eq=False)
class Merging:
    """How the tokens at a place become fewer.

    Attributes:
        index: int64 [B, T'], an old token that each new one stands for, no two of a row alike.
        new: T'.
        content: makes the new tokens [B, T', C], given the token map's source.
        inverse: int64 [B, T], the new token that holds each old one; None where old tokens are in several.
        placed: int64 [B, T'], where new tokens take their positions from, if that is not `index`.
    """

    index: Node
    new: Length
    content: Callable[[Node], Node]
    inverse: Node | None = None
    placed: Node | None = None


def tokens_of_images(ctx: Context, place: Place, at: Sequence) -> int:
    """How many tokens of images there are to merge in each row.

    Raises:
        EditError: the sequence holds text, which would be merged with them, or its length is not known.
    """
    if is_text_axis(ctx, at.axis):
        raise EditError(
            "tokens of images cannot be merged where they stand among those of a text",
            where=[node_place(place.node)],
            found=place.address,
            remedy="merge at projector.input or projector.output",
        )
    tokens = product(resolve(at.axis))
    if not isinstance(tokens, int):
        raise EditError(
            "the number of image tokens is not known when the graph is compiled",
            found=str(tokens),
            remedy="compile with a static image size",
        )
    return tokens
