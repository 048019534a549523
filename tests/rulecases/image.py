"""Aggregation tokens return no logits: `core/test_insert_tower.py` runs them by hand."""

from typing import Any

import naive
from torch import Tensor, nn

from rulecases import RuleCase


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    raise AssertionError("a descriptor is no logits")


CASE = RuleCase(models=(), options=lambda model, keep: {}, run=_run, drops=False, chooses=False)
