"""TokenFLEX's pooling on the models of the fleet, which have grids of 4 by 4 patches."""

from typing import Any

import merging_naive
from torch import Tensor, nn

from rulecases import RuleCase


def _side(keep: Any) -> int:
    """Rows and columns for what the matrix calls a budget: all of them, one, three (of bins that overlap) or two."""
    return {float: 4, str: 3}.get(type(keep), min(keep, 2) if isinstance(keep, int) else 0)


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> Any:
    return merging_naive.run(model, inputs, merging_naive.pooled(_side(keep)))


# With the class token as a feature there is no grid.
CASE = RuleCase(("llava", "llava-siglip-qwen2"), options=lambda model, keep: {"n": _side(keep)}, run=_run)
