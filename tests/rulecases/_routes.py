"""What routes have in common in the matrix: a prompt is the model's own, whatever later steps attend to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
from torch import nn

from rulecases import RuleCase


def case(options: Callable[[nn.Module], dict[str, Any]]) -> RuleCase:
    """A rule's case; which keys later steps read is asked of the same rules in test_route."""
    return RuleCase(
        models=("llama", "qwen2", "llava"),
        options=lambda model, keep: options(model),
        run=lambda model, inputs, keep: naive.run(model, inputs),
        drops=False,
        chooses=False,
        keeps=("1/3", "all"),
    )
