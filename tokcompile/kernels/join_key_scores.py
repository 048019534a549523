"""tokred::join_key_scores: several scores of the keys of a cache as one."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _candidates, _library

HOW = ("max", "sum")


def reference(scores: list[Tensor], valid: Tensor | None, last: int, align: bool, how: str) -> Tensor:
    """Take the largest of each key's scores, or their sum.

    Args:
        scores: real [B, H, T] each.
        valid: bool [B, T], real tokens; None: all are.
        last: the last so many real tokens of each row do not count for the means.
        align: whether the scores of each head are first multiplied by what brings their mean over the real tokens
            that count to the mean of the last of `scores`. A mean of 0 stays as it is.
        how: "max" or "sum".

    Returns:
        float32 [B, H, T].

    Raises:
        ValueError: no scores, shapes that differ, or an unknown `how`.
    """
    if not scores or any(each.dim() != 3 or each.shape != scores[0].shape for each in scores):
        raise ValueError(f"scores must be [B, H, T] and of one shape, not {[list(each.shape) for each in scores]}")
    if how not in HOW:
        raise ValueError(f"how must be one of {', '.join(HOW)}, not {how!r}")
    wide = [each.to(torch.float32) for each in scores]
    if align:
        batch, _, tokens = wide[0].shape
        counted = _candidates.between_ends(valid, None, batch, tokens, 0, last, wide[0].device)[:, None]
        # The number of tokens cancels, so that sums do.
        sums = [torch.where(counted, each, 0.0).sum(2, keepdim=True) for each in wide]
        wide = [each * torch.where(total == 0, 1.0, sums[-1] / total) for each, total in zip(wide, sums, strict=True)]
    joined = wide[0]
    for each in wide[1:]:
        joined = torch.maximum(joined, each) if how == "max" else joined + each
    return joined


join_key_scores = _library.define(
    "join_key_scores(Tensor[] scores, Tensor? valid, int last, bool align, str how) -> Tensor", reference
)
