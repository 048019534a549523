"""Holistic queries stand in towers: `core/test_insert_tower.py` runs these by hand, alone and in a LLaVA."""

from typing import Any

import naive
from torch import Tensor, nn

from rulecases import RuleCase


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    raise AssertionError("a tower alone has no text to run")


CASE = RuleCase(models=(), options=lambda model, keep: {}, run=_run, drops=False, chooses=False)
