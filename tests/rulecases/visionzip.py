"""VisionZip on the models of the fleet, with a class token and without."""

from typing import Any

import merging_naive
import naive
from torch import Tensor, nn

from rulecases import RuleCase


def _budget(keep: Any) -> tuple[int, int]:
    """Dominant and contextual tokens for what the matrix calls a budget."""
    return {float: (99, 1), str: (4, 2)}.get(type(keep), (2, 1) if keep == 1 else (6, 3))


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    dominant, contextual = _budget(keep)
    queries = "cls" if naive.class_tokens(model) else "all"
    return {"dominant": dominant, "contextual": contextual, "queries": queries}


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    return merging_naive.run(model, inputs, merging_naive.zipped(*_budget(keep)))


# A class token that is a feature like others is refused.
CASE = RuleCase(("llava", "llava-siglip-qwen2"), options=_options, run=_run)
