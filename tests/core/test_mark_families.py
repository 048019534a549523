"""Marks on vision-language families: what each says is what its own modules say on the new sequence."""

from __future__ import annotations

from typing import Any

import byhand
import marking
import pytest
import torch
import unloaded
from harness import difference, refusal
from torch import Tensor, nn

import tokcompile
from tokcompile import Recording
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
USUAL = ("paligemma", "smolvlm")
NAMES = ("llava", "qwen2_vl", "qwen2_5_vl", "internvl", "smolvlm", "idefics3", "paligemma", "mistral3")
REFUSED = {
    "llava_next": "scores of one sequence",  # crops are put together behind the projector: the scores are of crops
    "llava_onevision": "scores of one sequence",
    "molmo2": "scores of one sequence",  # attention pools patches
    "gemma3": "where attention has a window",
    "mllama": "markers stand for image tokens",  # text attends to patches, which are no tokens of its own
}


def _cases(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in USUAL else (pytest.mark.slow,)) for name in names]


def _compiled(name: str, batch: int) -> tuple[nn.Module, dict[str, Tensor], Tensor, list[list[int]]]:
    """A model, its inputs, logits under the rule, and the slots of each row."""
    family = catalogue.family(name)
    if why := unloaded.missing(family.needs):
        pytest.skip(why)
    model, recording = family.build(), Recording()
    inputs = family.example(model, batch=batch, padded=batch > 1)
    tokcompile.compile(model, rule="pospad", keep="1/3", target="eager", record=recording)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    tokcompile.restore(model)
    (slots,) = recording.maps.values()
    return model, inputs, logits, slots.tolist()


def by_hand(model: nn.Module, inputs: dict[str, Tensor], listed: list[int]) -> Tensor:
    """Logits [1, T', vocabulary] of one row whose blocks are given the new sequence."""
    blocks = byhand.block_list(model, "model.language_model", "model.text_model", "language_model")
    ends = [slot if slot >= 0 else -2 - slot for slot in listed if slot != -1]
    starts = [before + 1 for before in [-1, *ends[:-1]]]
    held: list[Tensor] = []

    def see(module: nn.Module, args: Any, kwargs: Any) -> None:
        held.append(args[0] if args else kwargs["hidden_states"])

    def mark(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        for new, (start, end) in enumerate(zip(starts, ends, strict=True)):
            hidden[0, new] = held[0][0, start : end + 1].mean(0)
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    first = blocks[0].register_forward_pre_hook(see, with_kwargs=True)
    try:
        with byhand.applied([byhand.Cut(blocks, 0, [ends], inputs["input_ids"].shape[1])]):
            last = blocks[0].register_forward_pre_hook(mark, with_kwargs=True)
            with torch.no_grad():
                logits = model(**inputs, use_cache=False).logits
            last.remove()
    finally:
        first.remove()
    return logits


@pytest.mark.parametrize("name", _cases(NAMES))
def test_one_row_is_as_by_hand(name: str) -> None:
    model, inputs, logits, slots = _compiled(name, 1)
    expected = by_hand(model, inputs, slots[0])
    assert any(slot < -1 for slot in slots[0])
    assert difference(logits[:, -expected.shape[1] :], expected) <= 1e-4


@pytest.mark.parametrize("name", _cases(NAMES))
def test_padded_rows_put_markers_where_a_loop_does(name: str) -> None:
    _, inputs, logits, slots = _compiled(name, 2)
    assert logits.isfinite().all()
    for listed in slots:
        there = {slot for slot in listed if slot >= 0}
        gone = [place not in there for place in range(inputs["input_ids"].shape[1])]
        assert listed == marking.listed(marking.walk(gone), len(listed))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_marked_is_refused(name: str) -> None:
    with pytest.raises(Exception, match=REFUSED[name]) as caught:
        _compiled(name, 2)
    assert refusal(caught.value)
