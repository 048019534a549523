"""`model.generate` from a pruned prompt on every family with a decoder: each step equals a run by hand without a cache.

The prompt loses tokens before its second block, two rows are padded, so that blocks have caches of two lengths.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import byhand
import families
import pytest
import torch
import transformers
from harness import greedy, refusal
from packaging.version import Version
from torch import Tensor

import tokcompile
from tokcompile.models import catalogue

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 4
GREEDY = greedy(STEPS)
WINDOW = "takes more tokens from one end than the edit leaves"  # a cache of the last tokens, some of which were dropped
NOT_GENERATED = {
    **dict.fromkeys(("mistral", "gemma2", "gemma3_text", "cohere2", "starcoder2", "exaone4", "gpt_oss"), WINDOW),
    # Its attention is its own, and takes one mask for caches of two lengths: the error is PyTorch's.
    "falcon": "broadcast",
}
LENGTH = {"molmo2": 12}  # no sequence may be as long as the stream is wide, which a run by hand goes by
USUAL = ("deepseek_v3",)
NAMES = [name for name, family in catalogue.families().items() if family.kind in ("decoder", "vlm")]


def _cases() -> list[Any]:
    return [pytest.param(name, marks=() if name in USUAL else (pytest.mark.slow,), id=name) for name in NAMES]


def positioned(it: families.Subject, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs with the positions that `generate` gives: padding counts for none."""
    if "position_ids" not in inspect.signature(it.model.forward).parameters or "position_ids" in inputs:
        return inputs
    mask = inputs["attention_mask"]
    return inputs | {"position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}


def longer(it: families.Subject, inputs: dict[str, Any], token: Tensor) -> dict[str, Any]:
    """Inputs with one more token of text, int64 [B, 1]."""
    text = {"token_type_ids": 1 - it.family.options.get("mark", 1), "mm_token_type_ids": 0, "attention_mask": 1}
    more = {name: torch.full_like(token, value) for name, value in text.items()} | {"input_ids": token}
    out = {name: torch.cat([v, more[name]], 1) if name in more else v for name, v in inputs.items()}
    if "cross_attention_mask" in out:
        out["cross_attention_mask"] = torch.cat([out["cross_attention_mask"], out["cross_attention_mask"][:, -1:]], 1)
    positions = out.get("position_ids")
    if positions is not None and positions.ndim == 3:
        following = positions.amax((0, 2), keepdim=True).expand(positions.shape[0], -1, 1) + 1
        out["position_ids"] = torch.cat([positions, following], 2)
    return out


def by_hand(
    it: families.Subject, kept: byhand.Kept, steps: int = STEPS, block: int = 1, compact: bool = False
) -> Tensor:
    """Logits of each step, [B, steps, V], of runs over all tokens so far."""
    inputs, kept, logits = dict(it.inputs), [list(row) for row in kept], []
    length = inputs["input_ids"].shape[1]
    for step in range(steps):
        given = positioned(it, inputs)
        (states,) = families.hand_run(it, "decoder", kept, block, inputs=given, length=length + step, compact=compact)
        logits.append(states[:, -1])
        inputs = longer(it, inputs, logits[-1].argmax(-1, keepdim=True))
        kept = [[*row, length + step] for row in kept]
    return torch.stack(logits, 1)


# Older transformers makes a mask even when no token is padding, of the first layer's length for all.
NO_MASK = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="a mask without padding")


@pytest.mark.parametrize(
    ("block", "padded"), [pytest.param(0, True, marks=pytest.mark.slow), pytest.param(1, False, marks=NO_MASK)]
)
def test_a_window_wider_than_all_tokens_is_none(block: int, padded: bool, tmp_path: Path) -> None:
    """A cache of the last tokens counts those that it was given: it is told how many stayed."""
    family = catalogue.family("mistral")
    it = families.subject(family.model_copy(update={"config": {**family.config, "sliding_window": 256}}))
    prompt = family.example(it.model, batch=2, padded=padded)
    it.inputs = prompt | {"use_cache": False}
    _, (kept,) = families.dropped(it, "decoder", tmp_path, block=block, keep=7)
    expected = by_hand(it, kept, block=block)
    torch._dynamo.reset()
    options = families.options_for(it, "decoder", tmp_path, block=block, keep=7)
    tokcompile.compile(it.model, target="eager", **options)
    got = torch.stack(it.model.generate(**prompt, **GREEDY).logits, 1)
    assert families.compared([got], [expected]) <= 1e-4


@pytest.mark.parametrize("name", _cases())
def test_generate_after_a_drop_equals_a_run_by_hand(name: str, tmp_path: Path) -> None:
    length = LENGTH.get(name, 17)
    it = families.subject(catalogue.family(name), length=length)
    options = families.options_for(it, "decoder", tmp_path, keep=7)
    _, (kept,) = families.dropped(it, "decoder", tmp_path, keep=7)
    expected = by_hand(it, kept)
    prompt = it.family.example(it.model, batch=2, padded=True, length=length)
    torch._dynamo.reset()
    tokcompile.compile(it.model, target="eager", **options)
    try:
        if name in NOT_GENERATED:
            with pytest.raises(Exception, match=NOT_GENERATED[name]) as caught:
                it.model.generate(**prompt, **GREEDY)
            assert NOT_GENERATED[name] != WINDOW or refusal(caught.value).where
            return
        got = torch.stack(it.model.generate(**prompt, **GREEDY).logits, 1)
    finally:
        tokcompile.restore(it.model)
    assert families.compared([got], [expected]) <= 1e-4
