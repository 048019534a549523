"""Images alone, and noisy latents of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def pixels(
    model: nn.Module,
    batch: int,
    padded: bool,
    length: int,
    seed: int,
    size: int = 0,
    channels: int = 3,
    name: str = "pixel_values",
) -> dict[str, Tensor]:
    """pixel_values, float32 [batch, channels, size, size]; nothing is padded.

    Args:
        model: its configuration says the size and the channels, if it has one.
        batch: images.
        padded: has no effect.
        length: has no effect.
        seed: of the pixels.
        size: height and width, for a model without a configuration.
        channels: for a model without a configuration.
        name: of the argument.
    """
    config = getattr(model, "config", None)
    size, channels = getattr(config, "image_size", size), getattr(config, "num_channels", channels)
    rng = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, channels, size, size, generator=rng)}


def latents(model: nn.Module, batch: int, padded: bool, length: int, seed: int) -> dict[str, Tensor]:
    """latents, float32 [batch, channels, size, size]; timestep of 1000 and label, int64 [batch]; nothing is padded."""
    rng = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(batch, model.in_channels, model.input_size, model.input_size, generator=rng),
        "timestep": torch.randint(0, 1000, (batch,), generator=rng),
        "label": torch.randint(0, model.num_classes, (batch,), generator=rng),
    }
