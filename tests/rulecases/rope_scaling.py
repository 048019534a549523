"""Stretched frequencies on the models of the fleet, by transformers' own tables where a configuration asks for them."""

from copy import deepcopy
from typing import Any

import fleet
import naive
import torch
from torch import Tensor, nn
from turned import text_of

from rulecases import RuleCase

SCALING = {"1/3": {"scaling": "linear", "factor": 3.0}, 1: {"scaling": "yarn", "factor": 4.0, "trained": 64}}


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    if keep == 1.0 and isinstance(keep, float):
        return {"base": model.config.get_text_config().rope_parameters["rope_theta"], "scaling": "none"}
    return SCALING.get(keep, SCALING["1/3"])


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    text = text_of(model)
    asked = SCALING.get(keep, SCALING["1/3"])
    config = deepcopy(model.config.get_text_config())
    config.rope_parameters = {"rope_type": asked["scaling"], "rope_theta": 10000.0, "factor": asked["factor"]}
    if "trained" in asked:
        config.rope_parameters["original_max_position_embeddings"] = asked["trained"]
    own = text.rotary_emb
    text.rotary_emb = type(own)(config)
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        text.rotary_emb = own
    return naive.Ran(logits, [], [logits.shape[1]] * config.num_hidden_layers)


CASE = RuleCase(
    models=fleet.DECODERS,
    options=_options,
    run=_run,
    tolerance=1e-5,
    coarse=0.1,
    near=(0, 0.1),  # a model in bfloat16 has rounded frequencies, which are computed again
    drops=False,
    chooses=False,
)
