"""Runs of image tokens replaced by markers, by hand: a loop over the tokens of one row, without any padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import naive
import torch
from torch import Tensor, nn

Walked = list[tuple[int, int | None]]
"""The new sequence of a row: the place of each token, and where its run begins; None for an old token."""


@dataclass(frozen=True)
class Marks:
    """What is replaced, and by what.

    Attributes:
        choose: the image tokens of each image that stay, counted from the image's first.
        content: what a marker holds, made of the stream [T, C], the walk's places and the image tokens.
        shortest: tokens of the shortest run that is replaced.
        layer: the decoder layer before which that happens.
        then: tokens dropped before a later layer, of what is left.
    """

    choose: Callable[[nn.Module, Tensor], naive.Kept]
    content: str | Tensor = "run_mean"
    shortest: int = 1
    layer: int = 0
    then: naive.Cut | None = None


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
    for number, (own, walked, _) in enumerate(rows):
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
        logits, now = [], marks
        for _ in range(steps):
            longer = torch.cat([ids, torch.tensor([said], dtype=torch.long)], 1)
            out, _, later = _row(model, longer, pixels, chosen, now, len(said))
            if not said:
                left = later
            if marks.then is not None:  # what was dropped first stays dropped, and new tokens stay
                again = naive._chosen_before([left], len(said) + 1)
                now = replace(marks, then=replace(marks.then, choose=again))
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
) -> tuple[Tensor, Walked, list[int]]:
    """Logits [T', vocabulary] of a row whose last `said` tokens are the model's own, its walk, and what a drop left."""
    places = ids[0] == model.config.image_token_index
    places[len(places) - said :] = False
    features = model.model.multi_modal_projector(naive.vision_features(model, pixels))
    hidden = model.get_input_embeddings()(ids)
    hidden = hidden.masked_scatter(places[None, :, None], features.to(hidden.dtype))
    image = places.tolist()
    walked = walk(dropped(image, kept), marks.shortest)
    positions = torch.arange(ids.shape[1])
    state = naive.State(hidden, torch.ones_like(places)[None], places[None])
    text, chosen = model.model.language_model, list[int]()
    for number, layer in enumerate(text.layers):
        if number == marks.layer:
            state.hidden = marked(state.hidden[0], walked, image, marks.content)[None]
            positions = positions[[end for end, _ in walked]]
            state.image = torch.tensor([[image[end] and start is None for end, start in walked]])
            state.valid = torch.ones_like(state.image)
        if marks.then is not None and number == marks.then.layer:
            (chosen,) = marks.then.choose(state)
            state.hidden, positions = state.hidden[:, chosen], positions[chosen]
        _layer(model, layer, state, positions)
    return model.lm_head(text.norm(state.hidden))[0], walked, chosen


def _layer(model: nn.Module, layer: nn.Module, state: naive.State, positions: Tensor) -> None:
    """Run a layer, and note the attention of its last query."""
    tokens = state.hidden.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
    mask = naive._for(model, causal, state.hidden.dtype)
    tables = model.model.language_model.rotary_emb(state.hidden, positions[None])
    with naive._recorded(layer.self_attn) as seen:
        out: Any = layer(state.hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=tables)
    state.hidden = out[0] if isinstance(out, tuple) else out
    valid = torch.ones(1, tokens, dtype=torch.bool)
    state.scores.append(naive._last_row(layer.self_attn, seen, tables, causal, valid))
