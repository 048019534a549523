"""PosPad on the models of the fleet: the score is the attention that the last vision block in use pays."""

from typing import Any

import marking
import naive
from torch import Tensor, nn

from rulecases import RuleCase


def by_attention(keep: Any) -> Any:
    """The patches of each image that get most attention in the last block that the model uses."""

    def choose(model: nn.Module, pixels: Tensor) -> naive.Kept:
        config = model.config.vision_config
        feature = model.config.vision_feature_layer
        block = config.num_hidden_layers + feature if feature < 0 else feature - 1
        scores = naive.vision_attention(model, pixels, block)
        return [naive.best(row, range(len(row)), naive.count(keep, len(row))) for row in scores]

    return choose


CASE = RuleCase(
    models=("llava", "llava-siglip-qwen2"),
    options=lambda model, keep: {"keep": keep},
    run=lambda model, inputs, keep: marking.run(model, inputs, marking.Marks(by_attention(keep))),
    # Rows are run alone by hand, without padding.
    tolerance=1e-5,
    coarse=0.1,
    drops=False,
    slots=True,
)
