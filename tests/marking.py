"""Runs of image tokens replaced by markers, by hand: a loop over the tokens of one row, without any padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import naive
import torch
from torch import Tensor, nn

Walked = list[tuple[int, int | None]]
"""The new sequence of a row: the place of each token, and where the run begins that it stands for; None for an old one."""


@dataclass(frozen=True)
class Marks:
    """What is replaced, and by what.

    Attributes:
        choose: the image tokens of each image that stay, counted from the image's first.
        content: what a marker holds, made of the stream [T, C], the walk's places and the image tokens.
        shortest: tokens of the shortest run that is replaced.
        layer: the decoder layer before which that happens.
    """

    choose: Callable[[nn.Module, Tensor], naive.Kept]
    content: str | Tensor = "run_mean"
    shortest: int = 1
    layer: int = 0


def walk(drop: Sequence[bool], shortest: int = 1) -> Walked:
    """Go through the tokens one by one; the method's description as a loop."""
    out: Walked = []
    place = 0
    while place < len(drop):
        end = place
        while drop[place] and end + 1 < len(drop) and drop[end + 1]:
            end += 1
        if drop[place] and end - place + 1 >= shortest:
            out.append((end, place))
        else:
            out += [(i, None) for i in range(place, end + 1)]
        place = end + 1
    return out


def listed(walked: Walked, slots: int) -> list[int]:
    """A walk as the slots of a graph list it: empty ones first, a marker by its place."""
    return [-1] * (slots - len(walked)) + [end if start is None else -2 - end for end, start in walked]


def capacity(tokens: int, images: int, kept: int, spans: int = 1) -> int:
    """Tokens that can be left, at most."""
    return tokens - images + kept + min(kept + spans, images - kept)


def dropped(image: Sequence[bool], kept: Sequence[int]) -> list[bool]:
    """Which tokens of a text go, of whose image tokens some stay."""
    ordinal, out = -1, []
    for yes in image:
        ordinal += yes
        out.append(bool(yes) and ordinal not in kept)
    return out


def marked(hidden: Tensor, walked: Walked, image: Sequence[bool], content: str | Tensor) -> Tensor:
    """The stream [T, C] of the new sequence."""
    rows = []
    for end, start in walked:
        if start is None:
            rows.append(hidden[end])
        elif isinstance(content, Tensor):
            rows.append(content.to(hidden.dtype))
        elif content == "run_mean":
            rows.append(hidden[start : end + 1].float().mean(0).to(hidden.dtype))
        elif content == "mean":
            rows.append(hidden[torch.tensor(image)].float().mean(0).to(hidden.dtype))
        else:
            rows.append(torch.zeros_like(hidden[end]))
    return torch.stack(rows)


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor], marks: Marks) -> naive.Ran:
    """Run a LLaVA by hand, each row alone; results stand at the right, as a graph's do."""
    kept = marks.choose(model, inputs["pixel_values"])
    rows = [_row(model, *_alone(inputs, number), kept[number], marks) for number in range(len(kept))]
    image = inputs["input_ids"] == model.config.image_token_index
    slots = capacity(image.shape[1], int(image[0].sum()), len(kept[0]))
    logits = torch.zeros(len(rows), slots, rows[0][0].shape[-1], dtype=rows[0][0].dtype)
    filled = torch.zeros(len(rows), slots, dtype=torch.bool)
    lists = []
    for number, (own, walked) in enumerate(rows):
        logits[number, slots - len(own) :], filled[number, slots - len(own) :] = own, True
        pad = image.shape[1] - int(inputs["attention_mask"][number].sum())
        whole = walk(dropped(image[number].tolist(), kept[number]), marks.shortest)
        assert [(end - pad, start) for end, start in whole[pad:]] == [
            (end, start if start is None else start + pad) for end, start in walked
        ]
        lists.append(listed(whole, slots))
    layers = len(model.model.language_model.layers)
    lengths = [image.shape[1]] * marks.layer + [slots] * (layers - marks.layer)
    return naive.Ran(logits, [lists], lengths, filled)


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, Tensor], steps: int, marks: Marks) -> Tensor:
    """Greedy continuation without a cache, each row alone: logits [B, steps, vocabulary]."""
    kept = marks.choose(model, inputs["pixel_values"])
    rows = []
    for number, chosen in enumerate(kept):
        ids, pixels = _alone(inputs, number)
        said: list[int] = []
        logits = []
        for _ in range(steps):
            longer = torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)
            out, _ = _row(model, longer, pixels, chosen, marks, len(said))
            logits.append(out[-1])
            said.append(int(out[-1].argmax()))
        rows.append(torch.stack(logits))
    return torch.stack(rows)


def _alone(inputs: dict[str, Tensor], number: int) -> tuple[Tensor, Tensor]:
    """Token numbers [1, T] of a row without its padding, and its pixels."""
    ids = inputs["input_ids"][number][inputs["attention_mask"][number].bool()]
    return ids[None], inputs["pixel_values"][number : number + 1]


def _row(
    model: nn.Module, ids: Tensor, pixels: Tensor, kept: Sequence[int], marks: Marks, said: int = 0
) -> tuple[Tensor, Walked]:
    """Logits [T', vocabulary] of a row whose last `said` tokens are the model's own, and its walk."""
    places = ids[0] == model.config.image_token_index
    places[len(places) - said :] = False
    features = model.model.multi_modal_projector(naive.vision_features(model, pixels))
    hidden = model.get_input_embeddings()(ids)
    hidden = hidden.masked_scatter(places[None, :, None], features.to(hidden.dtype))
    image = places.tolist()
    walked = walk(dropped(image, kept), marks.shortest)
    positions = torch.arange(ids.shape[1])
    text = model.model.language_model
    for number, layer in enumerate(text.layers):
        if number == marks.layer:
            hidden = marked(hidden[0], walked, image, marks.content)[None]
            positions = positions[[end for end, _ in walked]]
        hidden = _layer(model, layer, hidden, positions)
    return model.lm_head(text.norm(hidden))[0], walked


def _layer(model: nn.Module, layer: nn.Module, hidden: Tensor, positions: Tensor) -> Tensor:
    tokens = hidden.shape[1]
    mask = naive._for(model, torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None], hidden.dtype)
    tables = model.model.language_model.rotary_emb(hidden, positions[None])
    out: Any = layer(hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=tables)
    return out[0] if isinstance(out, tuple) else out
