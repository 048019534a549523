"""tokred::smooth_keys: scores of keys pooled along the sequence, without those of the last tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from .key_attention import last_places

HOW = ("avg", "max")


def reference(scores: Tensor, valid: Tensor | None, window: int, kernel: int, how: str) -> Tensor:
    """Pool scores over neighbouring tokens, stride 1, as if nothing stood beyond the first and the last that count.

    Args:
        scores: float [B, H, T], not negative, 0 for padding.
        valid: bool [B, T], real tokens; None: all are.
        window: the last so many real tokens of each row do not count: their scores are 0 before pooling.
        kernel: tokens that are pooled, odd; 1 pools nothing.
        how: "avg" (the divisor counts what is beyond the ends) or "max".

    Returns:
        [B, H, T], of the dtype of `scores`.

    Raises:
        ValueError: scores are not [B, H, T], an even kernel, a negative window or an unknown `how`.
    """
    if scores.dim() != 3:
        raise ValueError(f"scores must be [B, H, T], not {list(scores.shape)}")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, not {kernel}")
    if window < 0 or how not in HOW:
        raise ValueError(f"window must not be negative and how one of {', '.join(HOW)}, not {window} and {how!r}")
    batch, _, tokens = scores.shape
    if window:
        last = last_places(valid, batch, tokens, window, scores.device)
        spot = torch.where(last < 0, tokens, last)
        inside = torch.zeros(batch, tokens + 1, dtype=torch.bool, device=scores.device).scatter(1, spot, True)
        scores = torch.where(inside[:, None, :tokens], 0.0, scores)
    if kernel == 1:
        return scores
    if how == "avg":
        return F.avg_pool1d(scores, kernel, stride=1, padding=kernel // 2)
    # In two dimensions, because that of one takes the length of the example for the only one.
    return F.max_pool2d(scores, (1, kernel), stride=1, padding=(0, kernel // 2))


smooth_keys = _library.define(
    "smooth_keys(Tensor scores, Tensor? valid, int window, int kernel, str how) -> Tensor", reference
)
