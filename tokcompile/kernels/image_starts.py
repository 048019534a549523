"""tokred::image_starts: where the image of each token begins."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(positions: Tensor, visual: Tensor, size: int) -> Tensor:
    """The position of the first token of each token's image; -1 for tokens of text.

    Args:
        positions: integers [B or 1, T], which do not fall along a row.
        visual: bool [B, T], tokens of images.
        size: tokens of one image, by which images that stand side by side are told apart; 0 where those are one.

    Returns:
        int64 [B, T].

    Raises:
        ValueError: visual is not bool [B, T].
    """
    if visual.dim() != 2 or visual.dtype != torch.bool:
        raise ValueError(f"visual must be bool [B, T], not {visual.dtype} {list(visual.shape)}")
    index = torch.arange(visual.shape[1], device=visual.device)
    before = torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    run = torch.where(visual & ~before, index, 0).cummax(1).values
    inside = index - run
    first = visual & ((inside % size if size else inside) == 0)
    place = torch.where(first, index, 0).cummax(1).values
    starts = positions.long().expand(visual.shape[0], -1).gather(1, place)
    return torch.where(visual, starts, -1)


image_starts = _library.define("image_starts(Tensor positions, Tensor visual, int size) -> Tensor", reference)
