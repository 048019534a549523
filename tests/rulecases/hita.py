"""Holistic queries in the tower of a LLaVA, whose projector reads the patches alone."""

from typing import Any

import longer
import naive
from inserting import drawn, held
from torch import Tensor, nn

from rulecases import RuleCase

BLOCK = 1


def _count(keep: Any) -> int:
    return 0 if keep == 1.0 and isinstance(keep, float) else 1 if keep == 1 else 4


def _queries(model: nn.Module, keep: Any) -> Tensor:
    width = model.config.vision_config.hidden_size
    return drawn(max(_count(keep), 1), width).to(model.dtype)


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    weights = held("hita", "queries", _queries(model, keep))
    return {"block": BLOCK, "queries": _count(keep), "weights": weights}


def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    """The class token stands first, and LLaVA leaves it out; the queries, which come next, are no features."""
    tower = model.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    queries = _queries(model, keep)
    with longer.put_before(layers[BLOCK], queries, 1), longer.features_without_the_first(model, len(queries)):
        ran = naive.run(model, inputs)
    return naive.Ran(ran.logits, [], ran.lengths)


CASE = RuleCase(models=("llava",), options=_options, run=_run, drops=False, chooses=False)
