"""Random tokens on the models of the fleet."""

from typing import Any

import fleet
import naive
from torch import Tensor, nn

from rulecases import RuleCase


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    among = {} if fleet.images(model) else {"among": "all"}
    return {"keep": keep, "seed": 3, **among}


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    among = "image" if fleet.images(model) else "all"
    return naive.run(model, inputs, [naive.random(keep, seed=3, among=among)])


CASE = RuleCase(models=fleet.VLMS + fleet.DECODERS, options=_options, run=_run)
