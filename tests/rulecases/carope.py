"""Phases that grow with content, on the models of the fleet."""

from typing import Any

import fleet
import naive
import torch
from torch import Tensor, nn
from turned import content, text_of, turned

from rulecases import RuleCase
from tokcompile import Weights


def sizes(model: nn.Module) -> tuple[int, int]:
    """Key heads and width of the stream."""
    config = model.config.get_text_config()
    return config.num_key_value_heads, config.hidden_size


def parameters(model: nn.Module, keep: Any) -> tuple[Tensor, Tensor]:
    """Random ones for a budget; those at which phases are RoPE's for a budget of all."""
    heads, width = sizes(model)
    pairs = len(text_of(model).rotary_emb.inv_freq)
    rng = torch.Generator().manual_seed(7)
    weight, bias = torch.randn(heads, width, generator=rng) / 4, torch.randn(heads, generator=rng)
    if keep == 1.0 and isinstance(keep, float):
        theta = model.config.get_text_config().rope_parameters["rope_theta"]
        start = torch.tensor(theta, dtype=torch.float64).pow(1 / pairs).sub(1).expm1().log()
        return torch.zeros_like(weight), start.float().expand(heads).clone()
    return weight, bias


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    weights = Weights()
    for name, value in zip(("weight", "bias"), parameters(model, keep), strict=True):
        weights.of("carope", name, tuple(value.shape), lambda value=value: value)
    return {"weights": weights}


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    with turned(model, content(*parameters(model, keep), inputs["attention_mask"].bool())):
        logits = model(**inputs, use_cache=False).logits
    return naive.Ran(logits, [], [logits.shape[1]] * model.config.get_text_config().num_hidden_layers)


CASE = RuleCase(
    models=(*fleet.DECODERS, "llava"),
    options=_options,
    run=_run,
    tolerance=2e-5,
    coarse=0.2,
    near=(2e-5, 0.2),
    drops=False,
    chooses=False,
)
