"""tokred::clip_source: where the tokens stand that the frames of clips become."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _clips, _library
from .kept_indices import reference as listed


def reference(chosen: Tensor, stays: Tensor, cells: int, clip: int, count: int) -> Tensor:
    """List an old token for each new one of the clips of a video.

    A clip becomes the chosen tokens of its first frame, those that stay of each later frame, and what its first frame
    has become in the end, for which the last tokens of the clip stand that none of the others stands for. A clip of one
    frame becomes the chosen tokens of that frame.

    Args:
        chosen: int64 [N, F, m], the chosen tokens of each frame, ascending, each in [0, cells).
        stays: bool [N, F, m], those of them that stay: all of a clip's first frame, `count` of each other.
        cells: tokens of a frame.
        clip: frames of a clip; the last clip has those that are left over.
        count: as above.

    Returns:
        int64 [N, T'], places in the F * cells tokens of a video, no two of a row alike.

    Raises:
        ValueError: values of other shapes, no clips, or a clip that would become more tokens than it has.
    """
    if chosen.dim() != 3 or stays.dtype != torch.bool or stays.shape != chosen.shape:
        raise ValueError(f"chosen must be [N, F, m] and stays bool, not {list(chosen.shape)} and {list(stays.shape)}")
    frames, each = chosen.shape[1:]
    places = chosen + cells * torch.arange(frames, device=chosen.device).unsqueeze(1)
    made = []
    for start, number, length in _clips.cut(frames, clip):
        if _clips.emitted(count, length, each) > length * cells:
            new = _clips.emitted(count, length, each)
            raise ValueError(f"a clip of {length} frames of {cells} tokens cannot become {new}")
        there = _clips.apart(places, start, number, length) - start * cells
        # Places within a clip from here on.
        first = torch.arange(number, device=chosen.device) * length * cells
        first = first.expand(chosen.shape[0], number).reshape(-1, 1)
        at = there.flatten(1) - first
        own = at[:, :each]
        if length > 1:
            later = _clips.apart(stays, start, number, length)[:, 1:].flatten(1)
            own = torch.cat([own, at[:, each:].gather(1, listed(later, (length - 1) * count))], 1)
            free = torch.ones_like(at[:, :1], dtype=torch.bool).expand(-1, length * cells).scatter(1, own, False)
            last = free & (free.flip(1).cumsum(1).flip(1) <= each)
            own = torch.cat([own, listed(last, each)], 1)
        made.append((own + first + start * cells).reshape(-1, number * own.shape[1]))
    return torch.cat(made, 1)


clip_source = _library.define(
    "clip_source(Tensor chosen, Tensor stays, int cells, int clip, int count) -> Tensor", reference
)
