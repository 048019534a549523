"""Merges run by hand on a LLaVA: features mixed before or after the projector, and the text made to fit.

A merge says for every new feature, as a Python list, what each old token counts in it. Then follow a product of
matrices and transformers' own modules; nothing of tokcompile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import naive
import torch
from torch import Tensor, nn

Rows = list[list[float]]
"""For each new token, what every old one counts in it."""


@dataclass(frozen=True)
class Merge:
    """How the features of images are merged.

    Attributes:
        mix: gives the new features [images, N', C], those that the projector reads or that it makes, and for each an
            old one that it stands for.
        after: whether the projector's output is mixed, and not its input.
    """

    mix: Callable[[nn.Module, Tensor], tuple[Tensor, naive.Kept]]
    after: bool = False


@torch.no_grad()
def run(
    model: nn.Module,
    inputs: dict[str, Tensor],
    merge: Merge,
    cuts: Sequence[naive.Cut] = (),
    generated: int = 0,
) -> naive.Ran:
    """Run a LLaVA by hand. The image tokens stay that the new features stand for; the text is numbered anew.

    Args:
        cuts: drops in the decoder, of the text as it is after the merge.
        generated: how many tokens at the end are the model's own: no image tokens, whatever their numbers.
    """
    ids = inputs["input_ids"]
    valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    image = ids == model.config.image_token_index
    image[:, ids.shape[1] - generated :] = False
    features, source = merge.mix(model, inputs["pixel_values"])
    if not merge.after:
        features = model.model.multi_modal_projector(features)
    each = len(source) // len(ids)  # images in a row, or 1 where those of a row are merged as one
    rows = [source[start : start + each] for start in range(0, len(source), each)]
    span = int(image[0].sum()) // each
    ordinals = [[number * span + i for number, one in enumerate(row) for i in one] for row in rows]
    stay = [naive.stay(row, ordinals[b]) for b, row in enumerate(image.tolist())]
    ids, valid, image = (naive._take(each, stay) for each in (ids, valid, image))
    hidden = model.get_input_embeddings()(ids)
    hidden = hidden.masked_scatter(image[..., None], features.to(hidden.dtype))
    logits, kept, lengths = naive._decoder(model, naive.State(hidden, valid, image), cuts)
    return naive.Ran(logits, [source, stay, *kept], lengths)


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int, merge: Merge) -> Tensor:
    """Greedy continuation without a cache: the logits of each step, [B, steps, vocabulary]."""
    logits = [run(model, inputs, merge).logits[:, -1]]
    for done in range(1, steps):
        words = torch.stack([one.argmax(-1) for one in logits], 1)
        longer = inputs | {"input_ids": torch.cat([inputs["input_ids"], words], 1)}
        if "attention_mask" in inputs:
            longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1)
        logits.append(run(model, longer, merge, generated=done).logits[:, -1])
    return torch.stack(logits, 1)


def mixed(x: Tensor, rows: Sequence[Rows]) -> Tensor:
    """New tokens [B, N', C] of x's dtype, from old ones [B, N, C]; products and sums in float32."""
    return (torch.tensor(rows, dtype=torch.float32) @ x.float()).to(x.dtype)


def mean(members: Sequence[int], total: int) -> list[float]:
    """Each of some tokens counts alike; without any, none does."""
    return [1 / len(members) if i in members else 0.0 for i in range(total)]


# Dominant and contextual tokens.


def zipped(dominant: int, contextual: int, how: str = "sum") -> Merge:
    """VisionZip: the class token, what it looks at most, and evenly spaced tokens with those that are like them."""

    def mix(model: nn.Module, pixels: Tensor) -> tuple[Tensor, naive.Kept]:
        states, received, keys = _last_used(model, pixels)
        others = states.shape[1] - received.shape[1]
        pairs = zip(received, keys, strict=True)
        made = [zipped_row(r, k, others, dominant, contextual, how) for r, k in pairs]
        return mixed(states, [rows for rows, _ in made]), [source for _, source in made]

    return Merge(mix)


def zipped_row(
    received: Tensor, keys: Tensor, others: int, dominant: int, contextual: int, how: str
) -> tuple[Rows, list[int]]:
    """One image: what each patch receives [P], and its key [P, D]; `others` is 1 with a class token, else 0.

    Returns:
        What each token, the class token first, counts in each new one; and the patch that each stands for, the class
        token for the first of those that are merged.
    """
    total = others + len(received)
    chosen = naive.best(received, range(len(received)), dominant - others)
    remaining = [i for i in range(len(received)) if i not in chosen]
    step = max(1, len(remaining) // contextual)
    targets = remaining[::step][:contextual]
    unit = [key.float() / key.float().norm() for key in keys]
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in remaining:
        if i not in targets:
            likeness = [(unit[i] * unit[target]).sum().item() for target in targets]
            members[targets[likeness.index(max(likeness))]].append(i)
    rows = [mean([i], total) for i in range(others)] + [mean([others + i], total) for i in chosen]
    for target, joined in members.items():
        if how == "average":
            rows.append(mean([others + i for i in (target, *joined)], total))
        else:
            own = mean([others + i for i in joined], total)
            rows.append([1.0 + own[i] if i == others + target else own[i] for i in range(total)])
    merged = [i for i in remaining if i not in targets]
    return rows, [*merged[:others], *chosen, *targets]


def _last_used(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the last block whose output is used: its output, what each patch receives, and mean keys [B, P, D].

    A patch receives attention from the class token, or from every token where there is none; the sum over heads.
    """
    tower, config = model.model.vision_tower, model.config
    used = config.vision_feature_layer
    depth = config.vision_config.num_hidden_layers
    attention = naive._layers(model)[depth + used if used < 0 else used - 1].self_attn
    with naive._recorded(attention) as seen:
        states = tower(pixels, output_hidden_states=True).hidden_states[used]
    query, key = (naive._heads(seen[name], attention.head_dim) for name in ("q_proj", "k_proj"))
    others = naive.class_tokens(model)
    weights = (query.float() @ key.float().transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
    received = (weights[:, :, 0] if others else weights.mean(2)).sum(1)
    return states, received[:, others:], key.mean(1)[:, others:]


# Pooled grids.


def pooled(height: int, width: int | None = None) -> Merge:
    """TokenFLEX without its own projector: adaptive average pooling before the one that is there."""

    def mix(model: nn.Module, pixels: Tensor) -> tuple[Tensor, naive.Kept]:
        x = naive.vision_features(model, pixels)
        side = math.isqrt(x.shape[1])
        rows = pool_rows(side, side, height, width or height)
        first = [next(i for i, share in enumerate(row) if share) for row in rows]
        return mixed(x, [rows] * len(x)), [first] * len(x)

    return Merge(mix)


def pool_rows(height: int, width: int, out_height: int, out_width: int) -> Rows:
    """Each bin as a list over the grid, row by row."""

    def bins(size: int, count: int) -> list[range]:
        return [range(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]

    return [
        mean([y * width + x for y in down for x in across], height * width)
        for down in bins(height, out_height)
        for across in bins(width, out_width)
    ]


# Clusters.


def coded(k: int, iterations: int, seed: int = 0, normalise: bool = True, images: int = 1) -> Merge:
    """VQToken's base path: means of the projector's outputs, scaled to length one, of each of k clusters.

    Args:
        images: how many each row has, whose features are clustered together.
    """

    def mix(model: nn.Module, pixels: Tensor) -> tuple[Tensor, naive.Kept]:
        x = model.model.multi_modal_projector(naive.vision_features(model, pixels))
        x = x.unflatten(0, (-1, images)).flatten(1, 2)
        rows, source = [], []
        for tokens in x.float():
            labels = clusters(tokens, k, iterations, seed)
            sizes = tokens.norm(dim=1).tolist() if normalise else [1.0] * len(tokens)
            of_label = [mean([i for i, label in enumerate(labels) if label == c], len(labels)) for c in range(k)]
            rows.append(
                [[share / size if size else 0.0 for share, size in zip(row, sizes, strict=True)] for row in of_label]
            )
            spare = iter(i for i, label in enumerate(labels) if label in labels[:i])
            source.append([labels.index(c) if c in labels else next(spare) for c in range(k)])
        return mixed(x, rows), source

    return Merge(mix, after=True)


def clusters(x: Tensor, k: int, iterations: int, seed: int) -> list[int]:
    """Labels of one row [T, C]: tokens drawn as k-means++ does, then Lloyd's steps by cosine; in float64."""
    z = [row / row.norm() if row.norm() > 0 else row for row in x.double()]
    centroids, labels = [z[i] for i in _drawn(z, k, seed)], []
    for _ in range(iterations):
        for c in range(k) if labels else ():
            members = [v for v, label in zip(z, labels, strict=True) if label == c]
            centroids[c] = sum(members[1:], members[0]) / len(members) if members else centroids[c]
        labels = [
            min(range(k), key=lambda c, v=v: (1 - float(v @ centroids[c] / centroids[c].norm().clamp(min=1e-30)), c))
            for v in z
        ]
    return labels


def _drawn(z: list[Tensor], k: int, seed: int) -> list[int]:
    drawn: list[int] = []
    for number in range(k):
        odds = [0.0 if i in drawn else _odds(v, [z[d] for d in drawn]) for i, v in enumerate(z)]
        goal, total = sum(odds) * _share(number, seed), 0.0
        for i, odd in enumerate(odds):
            total += odd
            if odd and total > goal:
                drawn.append(i)
                break
    return drawn


def _odds(v: Tensor, drawn: list[Tensor]) -> float:
    return min(float((v - d).square().sum()) for d in drawn) + 1e-6 if drawn else 1.0


def _share(number: int, seed: int) -> float:
    """What a draw is of the unit interval: 23 bits of a hash of its number and the seed."""

    def mix(word: int) -> int:
        word = (word ^ word >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        word = (word ^ word >> 15) * 0x735A2D97 & 0xFFFFFFFF
        return word ^ word >> 15

    salt = mix(mix(seed & 0xFFFFFFFF) + (seed >> 32 & 0xFFFFFFFF) & 0xFFFFFFFF)
    return (mix(mix(number + 1) ^ salt) >> 9) * 2.0**-23
