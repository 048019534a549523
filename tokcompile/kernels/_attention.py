"""What the ops that recompute attention probabilities share: logits, masks and the reduction over heads."""

from __future__ import annotations

import torch
from torch import Tensor

HEADS = ("mean", "max", "sum")
LOWEST = torch.finfo(torch.float32).min
LOG2E = 1.4426950408889634


def check(query: Tensor, key: Tensor, mask: Tensor | None, heads: str) -> int:
    """Validate the inputs and return how many query heads share one key head. Raises ValueError."""
    if heads not in HEADS:
        raise ValueError(f"heads must be one of {', '.join(HEADS)}, not {heads!r}")
    if query.dim() != 4 or key.dim() != 4 or query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query and key must be [B, H, Tq, D] and [B, Hkv, Tk, D], not {list(query.shape)} and {list(key.shape)}"
        )
    if query.shape[1] % key.shape[1] != 0:
        raise ValueError(f"{query.shape[1]} query heads do not divide among {key.shape[1]} key heads")
    if mask is not None and not 2 <= mask.dim() <= 4:
        raise ValueError(f"mask must broadcast to [B, H, Tq, Tk], not {list(mask.shape)}")
    return query.shape[1] // key.shape[1]


def four_d(mask: Tensor) -> Tensor:
    """View a broadcastable mask of two to four dimensions as [B or 1, H or 1, Tq or 1, Tk or 1]."""
    return mask[(None,) * (4 - mask.dim())]


def adjust(logits: Tensor, mask: Tensor | None, causal: Tensor | None, softcap: float) -> Tensor:
    """Soft-cap scaled float32 logits, then hide what `mask` (bool: True is seen; float: added) and `causal` hide."""
    if softcap > 0:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None and mask.dtype == torch.bool:
        logits = torch.where(mask, logits, -torch.inf)
    elif mask is not None:
        logits = logits + mask.to(torch.float32)
    return logits if causal is None else torch.where(causal, logits, -torch.inf)


def base2(query: Tensor, key: Tensor, mask: Tensor | None, scale: float, is_causal: bool, softcap: float) -> Tensor:
    """Logits times log2(e) under a mask, float32 [B, H, Tq, Tk], as kernels keep them; only -inf hides."""
    wide = key.to(torch.float32).repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.to(torch.float32) @ wide.transpose(2, 3) * (scale * LOG2E)
    if mask is not None and mask.dtype != torch.bool:
        mask = torch.where(mask == -torch.inf, -torch.inf, (mask.to(torch.float32) * LOG2E).clamp(min=LOWEST))
    causal = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).tril() if is_causal else None
    return adjust(logits, mask, causal, softcap * LOG2E)


def exponentials(logits: Tensor, sink: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(logits - rowwise maximum) [..., Tq, Tk] and one over its row sums [..., Tq, 1]: softmax in two factors.

    Kept apart so that a reduction over rows needs no pass that divides. A fully hidden row has both factors 0. A sink
    [..., 1] is a logit beside those of the keys, which takes its share and gives it to no token.
    """
    peak = logits.amax(-1, keepdim=True).clamp(min=LOWEST)
    if sink is not None:
        peak = torch.maximum(peak, sink)
    weights = torch.exp(logits - peak)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    return weights, torch.where(total > 0, 1 / total, 0.0)


def sinks_by_row(sinks: Tensor | None, batch: int, heads: int) -> Tensor | None:
    """Sinks, float [H] or [B, H], as float32 [B, H]. Raises ValueError when they do not fit."""
    if sinks is None:
        return None
    if sinks.shape[-1] != heads or sinks.dim() > 2:
        raise ValueError(f"sinks must be [{heads}] or [B, {heads}], not {list(sinks.shape)}")
    return sinks.to(torch.float32).expand(batch, heads)
