"""tokred::attend: attention to keys that were chosen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _attention, _library


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(cap(query @ key^T * scale) + mask) @ value.

    Args:
        query: float [B, H, Tq, D].
        key, value: [B, Hkv, k, D] and [B, Hkv, k, Dv], H a multiple of Hkv (head h reads head h // (H // Hkv)).
        mask: bool (True is seen) or additive float [B or 1, G, Tq or 1, k], H a multiple of G; or None.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0: none.
        sinks: [H] or [B, H], a logit of each head beside those of the keys, which gives its share to none; or None.

    Returns:
        [B, H, Tq, Dv], of the dtype of `value`.

    Raises:
        ValueError: numbers of heads that do not divide each other.
    """
    check(query, key, mask)
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    if mask is not None and mask.shape[1] > 1:
        mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    if not softcap and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    logits = query.to(torch.float32) @ key.to(torch.float32).transpose(2, 3) * scale
    sink = _attention.sinks_by_row(sinks, query.shape[0], heads)
    logits = _attention.adjust(logits, mask, None, softcap)
    weights, share = _attention.exponentials(logits, None if sink is None else sink[:, :, None, None])
    return (weights * share).to(value.dtype) @ value


def check(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    """Refuse numbers of heads that do not divide each other. Raises ValueError."""
    heads = query.shape[1]
    if heads % key.shape[1] or (mask is not None and heads % mask.shape[1]):
        raise ValueError(f"{heads} query heads do not divide among {key.shape[1]} heads of keys, or those of the mask")


attend = _library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap, Tensor? sinks=None) "
    "-> Tensor",
    reference,
    triton="triton_attend",
)
