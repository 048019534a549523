"""For each rule of the library a model that it fits, with inputs and options."""

from __future__ import annotations

from typing import Any

import fleet
import harness
import torch
from rulecases import CASES
from torch import Tensor

import tokcompile
from tokcompile.models.catalogue import family

ELSEWHERE = {
    "aot_video": ("", {"windows": 1}),
    "hita": ("llava", {"block": 1, "queries": 4}),
    "image": ("clip", {"block": 1, "tokens": 4}),
}
"""Models and options of rules that the matrix of invariants has no case of; \"\" for a family with videos."""


def example(rule: str) -> tuple[torch.nn.Module, dict[str, Tensor], dict[str, Any]]:
    """A model that a rule fits, inputs, and options of the compiler, which hold the rule's parameters, made once."""
    known, made = CASES[rule], {"rule": rule, "weights": tokcompile.Weights()}
    name, options = ELSEWHERE[rule] if rule in ELSEWHERE else (known.models[0], None)
    if not name:
        videos = family("llava_onevision")
        model = videos.build()
        return model, videos.example(model, batch=2, padded=True, images=0, videos=1), {**made, **options}
    model = fleet.shared(name)
    given = known.options(model, known.keeps[0] if known.keeps else "1/3") if options is None else options
    return model, fleet.example(model, 2, () if name == "clip" else (1, 0)), {**made, **given}


def generated(rule: str, steps: int) -> Any:
    """What a small LLaVA generates under a rule in so many steps, always the likeliest token that is no image."""
    model, known = fleet.shared("llava"), CASES[rule]
    torch._dynamo.reset()
    tokcompile.compile(model, rule=rule, **known.options(model, known.keeps[0]), target="eager")
    try:
        inputs = fleet.example(model, 2, (1, 0))
        return model.generate(**inputs, **harness.greedy(steps), suppress_tokens=[fleet.IMAGE])
    finally:
        tokcompile.restore(model)
