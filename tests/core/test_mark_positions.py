"""Marks where positions have several rows and features are added to image tokens in deep layers: Qwen's models."""

from __future__ import annotations

from typing import Any

import marking
import pytest
import torch
from harness import difference, greedy
from torch import Tensor, nn

import tokcompile
from tokcompile import Recording
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3
USUAL = "qwen3_vl"  # deep features, too
SOME = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == USUAL else pytest.mark.slow) for n in ("qwen2_vl", "qwen2_5_vl", USUAL)]
)


def _given_to_the_text(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the unmodified model gives its text: embeddings with features, positions, and features of deep layers."""
    seen: dict[str, Any] = {}
    text = model.model.language_model
    hook = text.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    return seen


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict[str, Tensor], gone: list[set[int]]) -> list[Tensor]:
    """Logits [T', vocabulary] of each row alone, without padding, of whose image tokens some are replaced."""
    given = _given_to_the_text(model, inputs)
    image = inputs["input_ids"] == model.config.image_token_id
    levels = given.get("deepstack_visual_embeds") or []
    out, first = [], 0
    for row, valid in enumerate(inputs["attention_mask"].bool()):
        places = valid.nonzero()[:, 0].tolist()
        walked = marking.walk([place in gone[row] for place in places])
        hidden = given["inputs_embeds"][row, places]
        stream = marking.marked(hidden, walked, image[row, places].tolist(), "run_mean")[None]
        ends = [places[end] for end, _ in walked]
        causal = torch.ones(len(walked), len(walked), dtype=torch.bool).tril()[None, None]
        more = {}
        if levels:
            own = image[row].nonzero()[:, 0].tolist()
            stay = [first + i for i, place in enumerate(own) if place not in gone[row]]
            first += len(own)
            held = [start is None and bool(image[row, places[end]]) for end, start in walked]
            more = {
                "visual_pos_masks": torch.tensor([held]),
                "deepstack_visual_embeds": [level[stay] for level in levels],
            }
        states = model.model.language_model(
            inputs_embeds=stream,
            position_ids=given["position_ids"][:, row : row + 1, ends],
            attention_mask=causal,
            use_cache=False,
            **more,
        )
        out.append(model.lm_head(states.last_hidden_state)[0])
    return out


def _longer(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    more = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "mm_token_type_ids": tokens * 0}
    return inputs | {name: torch.cat([inputs[name], value], 1) for name, value in more.items() if name in inputs}


def _gone(recording: Recording, inputs: dict[str, Tensor], token: int) -> list[set[int]]:
    """The image tokens that a recorded choice replaces; the slots must be those that a loop finds."""
    (slots,) = recording.maps.values()
    image = inputs["input_ids"] == token
    count = int(image[0].sum())
    out = []
    for row, listed in enumerate(slots.tolist()):
        gone = {i for i, yes in enumerate(image[row].tolist()) if yes and i not in listed}
        assert count - len(gone) == count // 3
        walked = marking.walk([i in gone for i in range(image.shape[1])])
        assert listed == marking.listed(walked, marking.capacity(image.shape[1], count, count // 3))
        out.append(gone)
    return out


@SOME
def test_three_rows_of_positions(name: str) -> None:
    family = catalogue.family(name)
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    recording = Recording()
    tokcompile.compile(model, rule="pospad", keep="1/3", target="eager", record=recording)
    with torch.no_grad():
        logits = model(**inputs).logits
    tokcompile.restore(model)
    expected = by_hand(model, inputs, _gone(recording, inputs, model.config.image_token_id))
    assert logits.isfinite().all()
    for got, row in zip(logits, expected, strict=True):
        assert difference(got[-len(row) :], row) <= 1e-4


@SOME
def test_generate_with_four_rows_of_positions(name: str) -> None:
    """The first row counts the tokens of the text, the others say where an image's stand: a new token follows both."""
    family = catalogue.family(name)
    model = family.build()
    inputs = family.example(model, batch=2, padded=True)
    recording = Recording()
    tokcompile.compile(model, rule="pospad", keep="1/3", target="eager", record=recording)
    out = model.generate(**inputs, **greedy(STEPS))
    logits = torch.stack(out.logits, 1)
    tokcompile.restore(model)
    gone = _gone(recording, inputs, model.config.image_token_id)
    longer = inputs
    for step in range(STEPS):
        rows = torch.stack([row[-1] for row in by_hand(model, longer, gone)])
        assert difference(logits[:, step], rows) <= 1e-4
        longer = _longer(longer, rows.argmax(-1, keepdim=True))
