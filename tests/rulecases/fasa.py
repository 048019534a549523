"""Prompts under fasa, with a table of the first pairs."""

from __future__ import annotations

import torch
from torch import nn

from rulecases._routes import case
from tokcompile import Weights


def _table(model: nn.Module) -> Weights:
    config, weights = model.config.get_text_config(), Weights()
    shape = (config.num_hidden_layers, config.num_key_value_heads, 2)
    weights.of("fasa", "pairs", shape, lambda: torch.arange(2, dtype=torch.int16).expand(shape).clone())
    return weights


CASE = case(lambda model: {"budget": 3, "pairs": 2, "weights": _table(model)})
