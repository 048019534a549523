"""The prompt's caches under pyramidkv: of falling lengths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cached
import naive
from torch import Tensor, nn

from rulecases._evictions import case
from tokcompile.budget import Budget


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    ran = naive.run(model, inputs)
    tokens = ran.lengths[0]
    budget = Budget.parse(keep).count(tokens)
    return replace(ran, lengths=cached.pyramid(budget, 2, 4, len(ran.lengths), tokens))


CASE = case(lambda keep: {"budget": keep, "window": 2, "kernel": 3, "beta": 4}, _run)
