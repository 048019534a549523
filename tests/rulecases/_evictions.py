"""What evictions have in common in the matrix: the prompt's logits are the model's own, its caches of the budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import fleet
import naive
from torch import Tensor, nn

from rulecases import RuleCase
from tokcompile.budget import Budget


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    ran = naive.run(model, inputs)
    return replace(ran, lengths=[Budget.parse(keep).count(length) for length in ran.lengths])


def case(options: Callable[[Any], dict[str, Any]], run: Callable[..., naive.Ran] = _run, **more: Any) -> RuleCase:
    """A rule's case; which keys stay is asked of the same rules in test_evict."""
    return RuleCase(
        models=(*fleet.VLMS, "llama", "qwen2"),
        options=lambda model, keep: options(1.0 if keep == "all" else keep),
        run=run,
        drops=False,
        chooses=False,
        keeps=("1/3", 6, "all"),
        **more,
    )
