"""VQToken's clusters on the models of the fleet, image by image."""

from typing import Any

import fleet
import merging_naive
import naive
from torch import Tensor, nn

from rulecases import RuleCase


def _codes(keep: Any) -> int:
    """Clusters for what the matrix calls a budget."""
    return {float: 99, str: 4}.get(type(keep), keep)


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    return merging_naive.run(model, inputs, merging_naive.coded(_codes(keep), 10))


CASE = RuleCase(
    models=fleet.VLMS,
    options=lambda model, keep: {"codes": _codes(keep)},
    run=_run,
    # Shares and lengths are divided in another order.
    tolerance=1e-5,
    coarse=0.1,
)
