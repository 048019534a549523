"""tokred::merge_clips: put what the first frame of each clip has become where it is to stand."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _clips, _library


def reference(
    tokens: Tensor,
    x: Tensor,
    stays: Tensor,
    videos: int,
    before: int,
    clip: int,
    count: int,
    spread: float,
    temperature: float,
    iterations: int,
) -> Tensor:
    """Merge the tokens of a clip that do not stay into those of its first frame, and put these at the clip's end.

    The steps are those of `_clips.scan`, AOT's transport between frames. Without clips of two frames or more the tokens
    are as they were.

    Args:
        tokens: float [B, T', C], the tokens that `clip_source` lists, whose last m of each clip are replaced. Each
            video of a row may have other tokens before them and after them.
        x: float [B * videos, F, m, C], the chosen tokens of each frame.
        stays: bool [B * videos, F, m], as `clip_stays` has them.
        videos: of each row.
        before: how many other tokens stand before those of a video's clips.
        clip, count, spread, temperature, iterations: as of `clip_stays`.

    Returns:
        [B, T', C], the dtype of `tokens`.

    Raises:
        ValueError: values of other shapes, or no clips.
    """
    _clips.check(x, stays)
    width, each = tokens.shape[2], x.shape[2]
    rest = tokens.reshape(-1, tokens.shape[1] // videos, width)
    end = before
    for start, number, length in _clips.cut(x.shape[1], clip):
        new = _clips.emitted(count, length, each)
        if length == 1:
            end += number * new
            continue
        kept = _clips.apart(stays, start, number, length)
        frames = _clips.apart(x, start, number, length)
        merged, _ = _clips.scan(frames, lambda _, later, kept=kept: kept[:, later], spread, temperature, iterations)
        merged = merged.reshape(-1, number, each, width).to(tokens.dtype)
        own = rest[:, end : end + number * new].reshape(-1, number, new, width)
        own = torch.cat([own[:, :, : new - each], merged], 2).reshape(-1, number * new, width)
        rest = torch.cat([rest[:, :end], own, rest[:, end + number * new :]], 1)
        end += number * new
    return rest.reshape(tokens.shape)


merge_clips = _library.define(
    "merge_clips(Tensor tokens, Tensor x, Tensor stays, int videos, int before, int clip, int count, float spread,"
    " float temperature, int iterations) -> Tensor",
    reference,
)
