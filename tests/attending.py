"""Attention written out in place of a model's own, for runs by hand that change what single queries see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "written-out"
Change = Callable[[int, float, Tensor, Tensor, Tensor, Tensor], None]
"""Sets rows of the last argument: the number of the layer, the scale of its scores, queries [B, H, T, D], keys and
values [B, Hkv, T, D], and what the attention gives, [B, H, T, D]."""


@contextmanager
def attending(model: nn.Module, change: Change) -> Iterator[None]:
    """Let a model attend by written-out attention; what a causal one gives is changed before the model goes on."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys, values = (x.repeat_interleave(group, 1) for x in (key, value))
        logits = query @ keys.transpose(2, 3) * scale
        if attention_mask is not None:
            logits = logits + attention_mask[..., : keys.shape[2]]
        out = logits.softmax(-1) @ values
        if getattr(module, "is_causal", True):
            change(getattr(module, "layer_idx", 0), scale, query, key, value, out)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
