"""Meta-tokens in the decoders of the fleet: at random places, or after each so many tokens."""

from typing import Any

import fleet
import longer
import naive
import torch
from inserting import drawn, held
from torch import Tensor, nn

from rulecases import RuleCase


def _asked(keep: Any) -> dict[str, Any]:
    """What stands for a budget: none for everything, a tenth for a share, every fourth place for a count."""
    if keep == 1.0 and isinstance(keep, float):
        return {"share": 0}
    return {"share": 0.1, "seed": 5} if isinstance(keep, str) else {"share": 0.25, "places": "every"}


def _token(model: nn.Module) -> Tensor:
    return drawn(1, model.config.get_text_config().hidden_size).to(model.dtype)


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    return {**_asked(keep), "weights": held("meta_tokens", "meta", _token(model))}


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    valid = inputs["attention_mask"].bool().tolist()
    places = longer.every(valid, 4)
    if isinstance(keep, str):
        length = len(valid[0])
        count = round(length / 10)
        luck = torch.tensor(naive.lucky(length + count, 5))
        places = longer.at(valid, sorted(naive.best(luck, range(length + count), count)))
    logits, lengths = longer.decoder(model, inputs, places, _token(model))
    return naive.Ran(logits, [], lengths)


CASE = RuleCase(models=fleet.DECODERS, options=_options, run=_run, drops=False, chooses=False)
