"""Videos in a text: token numbers with runs of video tokens, and the pixels of the frames in the form a model takes.

In every function `videos` counts the videos of each row, and what follows it are options that a family gives; those
that `prompt.prompt` takes are passed on to it, as `length` is, and what it returns is returned. Every row has videos of
the same sizes in the same order, so that all rows have as many tokens. Where a model tells frames apart by time stamps,
each frame has a run of its own, and `between` has the length of a stamp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.models.inputs.prompt import Pair, noise, prompt, windows


def frames(
    model: nn.Module, batch: int, padded: bool, length: int, seed: int, videos: int = 1, *, frames: int, **more: Any
) -> dict[str, Tensor]:
    """Square frames of the tower's size: pixel_values_videos, [batch * videos, frames, 3, side, side].

    Args:
        frames: of each video, whose pooled features are one run of tokens, with one more at its end.
    """
    vision = model.config.vision_config
    side = vision.image_size
    # The model itself pools the features of a frame; zeros tell how many are left.
    pooled = model.model.apply_pooling(torch.zeros(1, (side // vision.patch_size) ** 2, 1))
    inputs = prompt(model, batch, padded, length, seed, [frames * pooled.shape[1] + 1] * videos, **more)
    return {**inputs, "pixel_values_videos": noise(model, seed, batch * videos, frames, 3, side, side)}


def patches(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    videos: int = 1,
    *,
    grids: list[list[int]],
    stamped: bool = False,
    **more: Any,
) -> dict[str, Tensor]:
    """Videos as one sequence of patches: pixel_values_videos [all patches, values of a patch] and video_grid_thw.

    video_grid_thw are int64 [batch * videos, 3], patches in time, height and width.

    Args:
        grids: patches of the videos of a row, in turn.
        stamped: each step in time has a run of tokens of its own, rather than each video.
    """
    vision = model.config.vision_config
    row = [grids[index % len(grids)] for index in range(videos)]
    merged = vision.spatial_merge_size**2
    runs = [n for time, *plane in row for n in ([math.prod(plane)] * time if stamped else [time * math.prod(plane)])]
    inputs = prompt(model, batch, padded, length, seed, [n // merged for n in runs], **more)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = noise(model, seed, batch * sum(runs), values)
    return {**inputs, "pixel_values_videos": pixels, "video_grid_thw": torch.tensor(row * batch)}


def pooled(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    videos: int = 1,
    *,
    frames: int,
    pool: Pair,
    **more: Any,
) -> dict[str, Tensor]:
    """Frames of patches, and which patches make a token; each frame has a run of tokens of its own.

    pixel_values_videos [batch * videos * frames, patches, values of a patch], video_token_pooling int64 [all tokens,
    patches of a token], -1 for none, and video_grids int64 [batch * videos, 3], frames, and rows and columns of tokens.

    Args:
        frames: of each video.
        pool: rows and columns of patches that make a token.
    """
    vision = model.config.vision_config
    side = vision.image_size[0] // vision.patch_size
    view = windows(torch.arange(side * side).view(side, side), pool)
    rows, columns = view.shape[:2]
    many = batch * videos
    one, start = view.flatten(0, 1), torch.arange(many * frames)[:, None, None] * side * side
    inputs = prompt(model, batch, padded, length, seed, [rows * columns] * (videos * frames), **more)
    return {
        **inputs,
        "pixel_values_videos": noise(model, seed, many * frames, side * side, vision.patch_size**2 * 3),
        "video_token_pooling": torch.where(one >= 0, one + start, -1).flatten(0, 1),
        "video_grids": torch.tensor([[frames, rows, columns]] * many),
    }
