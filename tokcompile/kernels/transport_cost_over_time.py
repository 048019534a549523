"""tokred::transport_cost_over_time: what it costs to pour the tokens of a frame into those of an earlier one."""

from __future__ import annotations

import math

from torch import Tensor

from . import _library, _vectors

_CLOSEST = 1 - 1e-6


def reference(kept: Tensor, gone: Tensor, frames: float, spread: float) -> Tensor:
    """(1 - cosine, less the least of its row) * (1 - exp(-frames^2 / (2 spread^2 + 1e-9))).

    AOT (TyroneLi/AOT at 88455ee, `llava_arch.py`), the transport between frames, with spread = 1.5: the factors are
    0.19926, 0.58889 and 0.86466 for 1, 2 and 3 frames. Cosines are clamped to +-(1 - 1e-6).

    Args:
        kept, gone: real [B, n, C] and [B, M, C], compared as float32; a zero vector has cosine 0 to all.
        frames: how many frames later the tokens to pour are.
        spread: in frames.

    Returns:
        float32 [B, n, M], at least 0; the least entry of each batch row is 0.

    Raises:
        ValueError: values of other shapes.
    """
    apart = 1 - _vectors.cosines(kept, gone).clamp(-_CLOSEST, _CLOSEST)
    later = 1 - math.exp(-(frames**2) / (2 * spread**2 + 1e-9))
    return (apart - apart.amin((1, 2), keepdim=True)) * later


transport_cost_over_time = _library.define(
    "transport_cost_over_time(Tensor kept, Tensor gone, float frames, float spread) -> Tensor", reference
)
