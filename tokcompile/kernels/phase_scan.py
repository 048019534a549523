"""tokred::phase_scan: rotary phases that grow from token to token by what each token says."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(logits: Tensor, valid: Tensor | None, start: Tensor | None, pairs: int, first: int) -> Tensor:
    """Sum exp(-i * g) over tokens, g = log1p(softplus(logits)), for frequencies i = first .. first + pairs - 1.

    CARoPE (Veisi et al. 2025), section 3: f = 1 / (1 + softplus(z)), and the phase of token m is the sum of f[t]^i over
    t <= m, the token itself included.

    Args:
        logits: floats [B, T, H], one number for each token and head.
        valid: bool [B, T]; other tokens add nothing. None for all.
        start: float32 [B, H, pairs], phases of the token before the first one; None for zeros.
        pairs: frequencies.
        first: power of the first one.

    Returns:
        float32 (float64 for float64 logits) [B, H, T, pairs].

    Raises:
        ValueError: logits is not [B, T, H].
    """
    if logits.dim() != 3 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits must be floats [B, T, H], not {logits.dtype} {list(logits.shape)}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    # Contiguous before anything else: gradients of softplus have other strides when they run than when they are traced.
    g = torch.log1p(torch.nn.functional.softplus(wide.transpose(1, 2).contiguous()))
    powers = torch.arange(first, first + pairs, device=logits.device, dtype=wide.dtype)
    steps = torch.exp(-g[..., None] * powers)
    if valid is not None:
        steps = steps * valid[:, None, :, None].to(steps.dtype)
    phases = steps.cumsum(2)
    return phases if start is None else phases + start[:, :, None]


phase_scan = _library.define(
    "phase_scan(Tensor logits, Tensor? valid, Tensor? start, int pairs, int first) -> Tensor", reference
)
