"""What positions say in place of a rotation, on the models of the fleet."""

import importlib
from typing import Any

import fleet
import naive
import torch
from torch import Tensor, nn
from turned import text_of

from rulecases import RuleCase
from tokcompile import Weights

HOW = {"1/3": "scalar", 1: "mul"}
LENGTH = 64


def tables(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Random words of 64 positions for queries and keys, [64, H, D]."""
    config = model.config.get_text_config()
    width = config.hidden_size // config.num_attention_heads
    rng = torch.Generator().manual_seed(11)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return tuple(torch.randn(LENGTH, count, width, generator=rng) for count in heads)


def _options(model: nn.Module, keep: Any) -> dict[str, Any]:
    weights = Weights()
    for name, table in zip(("q", "k"), tables(model), strict=True):
        weights.of("seqpe", name, tuple(table.shape), lambda table=table: table)
    return {"weights": weights, "how": HOW.get(keep, "scalar"), "length": LENGTH}


@torch.no_grad()
def _run(model: nn.Module, inputs: dict[str, Tensor], keep: Any) -> naive.Ran:
    """Queries and keys by hand; a score that positions add to is an attention with twice as many channels.

    The model scales by the channels that it has, so that nothing else changes.
    """
    module = importlib.import_module(type(text_of(model).layers[0].self_attn).__module__)
    own = module.apply_rotary_pos_emb

    def meet(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        said = [table[: q.shape[2]].transpose(0, 1).to(q.dtype).expand(len(q), -1, -1, -1) for table in tables(model)]
        if HOW.get(keep, "scalar") == "mul":
            return tuple(x * t for x, t in zip((q, k), said, strict=True))
        return tuple(torch.cat([x, t], -1) for x, t in zip((q, k), said, strict=True))

    module.apply_rotary_pos_emb = meet
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        module.apply_rotary_pos_emb = own
    return naive.Ran(logits, [], [logits.shape[1]] * model.config.get_text_config().num_hidden_layers)


CASE = RuleCase(
    models=fleet.DECODERS,
    options=_options,
    run=_run,
    tolerance=1e-5,
    coarse=0.1,
    drops=False,
    chooses=False,
    keeps=("1/3", 1),
)
