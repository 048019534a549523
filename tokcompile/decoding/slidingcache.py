"""Caches of sliding windows count the tokens that they were given: after a pruned prompt they are told how many stayed.

transformers' layer with a window sizes the mask of the next step by that count, not by what it holds.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_COUNT = "cumulative_length"


def has_windows(model: nn.Module) -> bool:
    """Whether a transformers model's text attends in sliding windows."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ())
    return "sliding_attention" in kinds or getattr(text, "sliding_window", None) is not None


def recount(cache: Any) -> None:
    """Let layers whose window was never full count the tokens that they hold; others are left as they are.

    Args:
        cache: what a model returned as `past_key_values`; None is allowed.
    """
    for layer in getattr(cache, "layers", ()):
        keys, counted = getattr(layer, "keys", None), getattr(layer, _COUNT, None)
        if keys is None or not isinstance(counted, int):
            continue
        held = keys.shape[-2]
        if held < min(counted, layer.sliding_window - 1):
            setattr(layer, _COUNT, held)
