"""Images in a text: token numbers with a run of image tokens for each image, and the pixels in the form a model takes.

In every function `images` counts the images of each row, and what follows it are options that a family gives; those
that `prompt.prompt` takes are passed on to it, as `length` is, and what it returns is returned. Every row has images
of the same sizes in the same order, so that all rows have as many tokens.
"""

from __future__ import annotations

import inspect
import math
import sys
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tokcompile.errors import TokredError
from tokcompile.models.inputs.prompt import Pair, noise, prompt, windows


def whole(
    model: nn.Module, batch: int, padded: bool, length: int, seed: int, images: int = 1, *, count: str, **more: Any
) -> dict[str, Tensor]:
    """Square images of the tower's size: pixel_values, [batch * images, 3, side, side].

    Args:
        count: where the configuration says how many tokens an image has, with dots.
    """
    side = model.config.vision_config.image_size
    height, width = side if isinstance(side, (tuple, list)) else (side, side)
    inputs = prompt(model, batch, padded, length, seed, [attrgetter(count)(model.config)] * images, **more)
    return {**inputs, "pixel_values": noise(model, seed, batch * images, 3, height, width)}


def crops(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    images: int = 1,
    *,
    sizes: list[Pair],
    counts: str = "",
    **more: Any,
) -> dict[str, Tensor]:
    """Images of any resolution as crops, the first of which is the whole image.

    pixel_values [batch * images, most crops, 3, side, side], zero where an image has fewer crops, and image_sizes,
    int64 [batch * images, 2], heights and widths.

    Args:
        sizes: of the images of a row, in turn.
        counts: the input that tells how many images each row has, int64 [batch]. With it, as in the processors of
            models that take it, only an image that is alone in its row is cut.
    """
    config, helpers = model.config, sys.modules[type(model).__module__]
    side = config.vision_config.image_size
    row = [sizes[index % len(sizes)] for index in range(images)]
    cut = images == 1 or not counts
    parts = [helpers.image_size_to_num_patches(s, config.image_grid_pinpoints, side) if cut else 1 for s in row]
    # The model itself packs what is there for an image; features of zeros tell how many tokens are left.
    pack = model.model.pack_image_features
    given = {name: getattr(config, name) for name in inspect.signature(pack).parameters if hasattr(config, name)}
    zeros = [torch.zeros(n, (side // config.vision_config.patch_size) ** 2, 2) for n in parts]
    _, runs = pack(zeros, torch.tensor(row), image_newline=torch.zeros(2), **given)

    inputs = prompt(model, batch, padded, length, seed, runs.tolist(), **more)
    pixels = noise(model, seed, batch, images, max(parts), 3, side, side)
    for index, n in enumerate(parts):
        pixels[:, index, n:] = 0
    inputs |= {"pixel_values": pixels.flatten(0, 1), "image_sizes": torch.tensor(row * batch)}
    return {**inputs, counts: torch.full((batch,), images)} if counts else inputs


def sized(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    images: int = 1,
    *,
    sizes: list[Pair],
    **more: Any,
) -> dict[str, Tensor]:
    """Images of their own sizes: pixel_values [batch * images, 3, most height, most width] and image_sizes.

    image_sizes are int64 [batch * images, 2], heights and widths; the pixels below and to the right are zero.

    Args:
        sizes: of the images of a row, in turn; multiples of the merged patches.
    """
    row = [sizes[index % len(sizes)] for index in range(images)]
    unit = model.config.vision_config.patch_size * model.config.spatial_merge_size
    inputs = prompt(model, batch, padded, length, seed, [h // unit * (w // unit) for h, w in row], **more)
    pixels = noise(model, seed, batch, images, 3, max(h for h, _ in row), max(w for _, w in row))
    for index, (height, width) in enumerate(row):
        pixels[:, index, :, height:] = 0
        pixels[:, index, :, :, width:] = 0
    return {**inputs, "pixel_values": pixels.flatten(0, 1), "image_sizes": torch.tensor(row * batch)}


def patches(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    images: int = 1,
    *,
    grids: list[list[int]],
    positions: bool = False,
    **more: Any,
) -> dict[str, Tensor]:
    """Images as one sequence of patches: pixel_values [all patches, values of a patch] and image_grid_thw.

    image_grid_thw are int64 [batch * images, 3], patches in time, height and width.

    Args:
        grids: patches of the images of a row, in turn.
        positions: add position_ids as the model computes them, int64 [3, batch, total].
    """
    vision = model.config.vision_config
    row = [grids[index % len(grids)] for index in range(images)]
    sizes = [math.prod(grid) for grid in row]
    inputs = prompt(model, batch, padded, length, seed, [n // vision.spatial_merge_size**2 for n in sizes], **more)
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    inputs["pixel_values"] = noise(model, seed, batch * sum(sizes), values)
    inputs["image_grid_thw"] = torch.tensor(row * batch)
    if positions:
        rope = model.model.get_rope_index
        known = {name: inputs[name] for name in inspect.signature(rope).parameters if name in inputs}
        inputs["position_ids"] = rope(**known)[0]
    return inputs


def of_size(model: nn.Module, options: dict[str, Any], image: Pair) -> dict[str, Any]:
    """Options of a maker, with images of one size in place of its own.

    Args:
        options: of `crops` or `sized`, which take `sizes`, or of `patches`, which takes `grids`.
        image: height and width in pixels.

    Raises:
        TokredError: the maker's images have sizes of their own; or the model cuts images in patches of which this one
            is no multiple.
    """
    if "sizes" in options:
        return {**options, "sizes": [list(image)]}
    vision = model.config.vision_config
    if "grids" not in options:
        raise TokredError(
            "the model takes images of one size alone",
            found=f"an image of {image[0]} x {image[1]} was asked for",
            remedy="leave the size of the image out",
        )
    unit = vision.patch_size * vision.spatial_merge_size
    if image[0] % unit or image[1] % unit or min(image) < unit:
        near = " x ".join(str(max(round(n / unit), 1) * unit) for n in image)
        raise TokredError(
            f"an image of {image[0]} x {image[1]} pixels cannot be cut into patches",
            found=f"{vision.spatial_merge_size} x {vision.spatial_merge_size} patches of {vision.patch_size} x "
            f"{vision.patch_size} pixels make a token",
            remedy=f"multiples of {unit}, such as {near}",
        )
    return {**options, "grids": [[1, *(n // vision.patch_size for n in image)]]}


def tiles(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    images: int = 1,
    *,
    tiles: int = 1,
    cut: int = 0,
    **more: Any,
) -> dict[str, Tensor]:
    """Images as tiles: pixel_values [batch, images * tiles, 3, side, side] and pixel_attention_mask, without the 3.

    pixel_attention_mask is bool, false where a tile has no pixels, which are zero there.

    Args:
        tiles: of each image; each has its own run of tokens.
        cut: columns of pixels that the last tile of each row lacks.
    """
    vision = model.config.vision_config
    side, many = vision.image_size, images * tiles
    run = (side // vision.patch_size) ** 2 // model.config.scale_factor**2
    inputs = prompt(model, batch, padded, length, seed, [run] * many, **more)
    pixels = noise(model, seed, batch, many, 3, side, side)
    mask = torch.ones(batch, many, side, side, dtype=torch.bool)
    mask[:, -1, :, side - cut :] = False
    return {**inputs, "pixel_values": pixels * mask[:, :, None], "pixel_attention_mask": mask}


def aspects(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    images: int = 1,
    *,
    ratios: list[int],
    **more: Any,
) -> dict[str, Tensor]:
    """Images as tiles for cross attention; an image has one token, and text attends to it from there on.

    pixel_values [batch, images, most tiles, 3, side, side], aspect_ratio_ids int64 [batch, images], aspect_ratio_mask
    int64 [batch, images, most tiles] and cross_attention_mask int64 [batch, total, images, most tiles].

    Args:
        ratios: numbers of the images' aspect ratios among those that the model supports, from 1, in turn.
    """
    vision = model.config.vision_config
    inputs = prompt(model, batch, padded, length, seed, [1] * images, **more)
    ids = torch.tensor([ratios[index % len(ratios)] for index in range(batch * images)]).view(batch, images)
    used = torch.tensor([0, *(h * w for h, w in vision.supported_aspect_ratios)])[ids]
    real = torch.arange(vision.max_num_tiles) < used[..., None]
    # Text attends to the image before it, and not to those before that.
    last = (inputs["input_ids"] == model.config.image_token_id).cumsum(1)
    seen = last[..., None] == torch.arange(1, images + 1)
    pixels = noise(model, seed, batch, images, vision.max_num_tiles, 3, vision.image_size, vision.image_size)
    return {
        **inputs,
        "pixel_values": pixels * real[..., None, None, None],
        "aspect_ratio_ids": ids,
        "aspect_ratio_mask": real.long(),
        "cross_attention_mask": (seen[..., None] & real[:, None]).long(),
    }


def pooled(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    images: int = 1,
    *,
    tiling: Pair = (1, 2),
    pool: Pair = (2, 2),
    **more: Any,
) -> dict[str, Tensor]:
    """Images as crops of patches, and which patches make a token: a coarse view of the image, then a fine one.

    pixel_values [batch * images * crops, patches, values of a patch], image_token_pooling int64 [all tokens, patches
    of a token], -1 for none, image_grids int64 [batch * images, 4], rows and columns of tokens of the coarse and the
    fine view, and image_num_crops int64 [batch * images].

    Args:
        tiling: rows and columns of crops in the fine view.
        pool: rows and columns of patches that make a token.
    """
    vision = model.config.vision_config
    side = vision.image_size[0] // vision.patch_size
    rows, columns = tiling
    each = side * side * (1 + rows * columns)
    coarse = torch.arange(side * side).view(side, side)
    fine = torch.arange(side * side, each).view(rows, columns, side, side).transpose(1, 2)
    views = [windows(coarse, pool), windows(fine.reshape(rows * side, columns * side), pool)]
    one = torch.cat([view.flatten(0, 1) for view in views])
    number = batch * images
    start = torch.arange(number)[:, None, None] * each
    grid = [n for view in views for n in view.shape[:2]]
    inputs = prompt(model, batch, padded, length, seed, [v.shape[0] * v.shape[1] for v in views] * images, **more)
    pixels = noise(model, seed, number * (1 + rows * columns), side * side, vision.patch_size**2 * 3)
    return {
        **inputs,
        "pixel_values": pixels,
        "image_token_pooling": torch.where(one >= 0, one + start, -1).flatten(0, 1),
        "image_grids": torch.tensor([grid] * number),
        "image_num_crops": torch.full((number,), 1 + rows * columns),
    }
