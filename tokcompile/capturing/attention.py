"""tokcompile's attention implementation for transformers: one operator per attention, under the caller's own mask.

transformers builds one mask per step, sized by the first layer's cache. Once layers hold caches of different lengths,
that mask fits only some of them, and Dynamo refuses the graph before any backend sees it. transformers' official
registries (AttentionInterface, AttentionMaskInterface) let an implementation take the caller's two-dimensional mask
instead, which fits every layer.
"""

from __future__ import annotations

from typing import Any

import torch

from tokcompile.errors import CaptureError
from tokcompile.kernels.attention import seen_keys  # which registers tokred::attention

NAME = "tokred"


def install(model: torch.nn.Module) -> str | None:
    """Let a transformers model use the implementation.

    Returns:
        The implementation that the model used before, None when it is not a transformers model or cannot choose one.

    Raises:
        CaptureError: the model masks attention in a way that this implementation does not carry.
    """
    if not hasattr(model, "set_attn_implementation"):
        return None
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    before = text._attn_implementation
    if before != "sdpa" or _windowed(text):
        return None
    _register()
    return before if _set(model, text, NAME) else None


def restore(model: torch.nn.Module, before: str) -> None:
    """Give a model the attention implementation back that it had before `install`."""
    _set(model, model.config.get_text_config(), before)


def _set(model: torch.nn.Module, text: Any, name: str) -> bool:
    """Set an implementation; False where the model has an attention of its own, which cannot be chosen."""
    # Only the text model's: a vision tower has no cache, and keeps its own.
    for module in model.modules():
        if getattr(module, "config", None) is text and hasattr(module, "set_attn_implementation"):
            if not module._can_set_attn_implementation():
                return False
            module.set_attn_implementation(name)
            return True
    raise CaptureError("the text model of this model was not found", found=type(model).__name__)


def _windowed(config: Any) -> bool:
    """Whether no layer attends to all keys, or one in a way that is neither this nor a window's."""
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return getattr(config, "sliding_window", None) is not None
    return "full_attention" not in kinds or not {*kinds} <= {"full_attention", "sliding_attention"}


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(
    *args: Any, attention_mask: torch.Tensor | None = None, mask_function: Any = None, **kwargs: Any
) -> torch.Tensor | None:
    """Hand the two-dimensional padding mask through, whole; a mask that says more than causal is made as ever."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    if mask_function is None or mask_function is causal_mask_function:
        return attention_mask
    return sdpa_mask(*args, attention_mask=attention_mask, mask_function=mask_function, **kwargs)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query [B, H, Tq, D], result [B, Tq, H, D] and no weights."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and queries != 1 and queries != keys:
        # Without a mask, fused attention would take the first key for the first query's own.
        attention_mask = torch.ones(query.shape[0], keys, dtype=torch.bool, device=query.device)
    if position_bias is not None:
        kwargs["position_bias"] = position_bias
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = seen_keys(attention_mask, queries, keys, causal)
    if attention_mask is not None and attention_mask.dim() == 2:
        out = torch.ops.tokred.attention(query, key, value, attention_mask, scale, causal)
        return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
    )
