"""AOT within an image, by loops over tokens: anchors of two layers, and transport of all others into these."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import naive
import torch
from torch import Tensor, nn

from rulecases import RuleCase

WINDOWS = 2  # a side: the grids of the fleet are 4 x 4
HARD, DISTANCE, TEMPERATURE, ITERATIONS = 0.1, 0.5, 0.1, 2


def anchors(early: Tensor, deep: Tensor, side: int, windows: int, budget: int, share: float = 0.5) -> list[int]:
    """The patches that stay of one image, scores [patches] of a square grid."""
    if budget >= len(early):
        return list(range(len(early)))
    local = int(budget * (1 - share))
    high = side // windows
    chosen: set[int] = set()
    for top in range(0, side, high):
        for left in range(0, side, high):
            window = [y * side + x for y in range(top, top + high) for x in range(left, left + high)]
            chosen |= set(naive.best(early, window, local // windows**2))
    rest = [i for i in range(len(deep)) if i not in chosen]
    return sorted(chosen | set(naive.best(deep, rest, budget - local)))


def poured(x: Tensor, stays: list[int], side: int) -> Tensor:
    """Features [patches, C] of one image, all poured into those that stay: [len(stays), C]."""
    gone = [i for i in range(len(x)) if i not in stays]
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    alike = unit[gone] @ unit[stays].T
    spots = [(i // side / (side - 1), i % side / (side - 1)) for i in range(len(x))]
    far = torch.tensor([[math.dist(spots[m], spots[k]) for k in stays] for m in gone], dtype=torch.float64)
    kernel = (-((1 - alike) + DISTANCE * far) / TEMPERATURE).exp()
    c = torch.ones(len(stays), dtype=torch.float64)
    for _ in range(ITERATIONS):
        r = (1 / len(gone)) / (kernel @ c)
        c = (1 / len(stays)) / (kernel.T @ r)
    plan = r[:, None] * kernel * c
    nearest = alike.argmax(1).tolist()
    out = []
    for k, anchor in enumerate(stays):
        soft = (x[anchor].double() + plan[:, k] @ x[gone].double()) / (1 + plan[:, k].sum())
        mine = [x[m].double() for m, into in zip(gone, nearest, strict=True) if into == k]
        whole = (x[anchor].double() + sum(mine)) / (1 + len(mine))
        out.append((1 - HARD) * soft + HARD * whole)
    return torch.stack(out).to(x.dtype)


def merged_text(
    model: nn.Module,
    inputs: dict[str, Tensor],
    features: Tensor,
    kept: naive.Kept,
    generated: int = 0,
    cuts: Sequence[naive.Cut] = (),
) -> naive.Ran:
    """A LLaVA run with merged features [images, n, C], numbered anew; `kept` are the patches that they stand for.

    Args:
        generated: how many tokens at the end are the model's own: no image tokens, whatever their numbers.
        cuts: drops in the decoder.
    """
    ids, valid = inputs["input_ids"], inputs["attention_mask"].bool()
    image = ids == model.config.image_token_index
    image[:, ids.shape[1] - generated :] = False
    text = [naive.stay(row, kept[b]) for b, row in enumerate(image.tolist())]
    ids, valid, image = (naive._take(t, text) for t in (ids, valid, image))
    hidden = model.get_input_embeddings()(ids).masked_scatter(image[..., None], features)
    logits, more, lengths = naive._decoder(model, naive.State(hidden, valid, image), cuts)
    return naive.Ran(logits, [kept, text, *more], lengths)


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: dict[str, Tensor],
    keep: Any,
    windows: int = WINDOWS,
    generated: int = 0,
    cuts: Sequence[naive.Cut] = (),
) -> naive.Ran:
    pixels, config = inputs["pixel_values"], model.config.vision_config
    depth, side = config.num_hidden_layers, config.image_size // config.patch_size
    early, deep = (naive.vision_attention(model, pixels, layer) for layer in (depth * 5 // 26, depth - 2))
    budget = naive.count(keep, side * side)
    kept = [anchors(early[b], deep[b], side, windows, budget) for b in range(len(pixels))]
    features = model.model.multi_modal_projector(naive.vision_features(model, pixels))
    if len(kept[0]) < side * side:
        features = torch.stack([poured(features[b], kept[b], side) for b in range(len(pixels))])
    return merged_text(model, inputs, features, kept, generated, cuts)


CASE = RuleCase(
    # With every token of the class token's sequence as a feature there is no patch grid.
    models=("llava", "llava-siglip-qwen2"),
    options=lambda model, keep: {"keep": keep, "windows": WINDOWS},
    run=run,
    tolerance=1e-5,
    coarse=0.1,
)
