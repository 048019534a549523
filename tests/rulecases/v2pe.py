"""Positions in fractions on the models of the fleet."""

from fractions import Fraction
from typing import Any

import fleet
import naive
import torch
from torch import Tensor, nn
from turned import at, turned, variable

from rulecases import RuleCase

DELTA = {"1/3": "1/4", 1: "1/256"}


def _delta(keep: Any) -> str:
    return "1" if keep == 1.0 and isinstance(keep, float) else DELTA.get(keep, "1/2")


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    images = (inputs["input_ids"] == fleet.IMAGE).tolist()
    with turned(model, at(variable(images, [Fraction(_delta(keep))]))):
        logits = model(**inputs, use_cache=False).logits
    return naive.Ran(logits, [], [len(images[0])] * model.config.get_text_config().num_hidden_layers)


CASE = RuleCase(
    models=fleet.VLMS,
    options=lambda model, keep: {"delta": _delta(keep)},
    run=_run,
    drops=False,
    chooses=False,
)
