"""tokred::keep_keys: which keys of each head of a cache stay."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library, _order
from .kept_indices import reference as indices_of

PADDING, CHOSEN, STAYS = range(3)


def reference(scores: Tensor, valid: Tensor | None, among: Tensor | None, first: int, last: int, k: int) -> Tensor:
    """Choose k tokens of each head: the first and last real ones of a row, then those by score.

    Args:
        scores: real [B, H, T], compared as float32.
        valid: bool [B, T], real tokens; None: all are. Padding that is up for choice is kept only where a row has fewer
            than k real tokens.
        among: bool [B, T], the tokens that are up for choice; all others stay. None: all are up for choice.
        first, last: how many real tokens at either end of a row stay in any case. Where k is too small for these, those
            of the largest scores stay.
        k: how many stay, 0 <= k <= T, those outside `among` counted; the caller guarantees room for these.

    Returns:
        int64 [B, H, k], ascending. Ties go to the lowest index; NaN ranks below -inf.

    Raises:
        ValueError: shapes that do not fit, or a mask that is not bool. RuntimeError: k out of range.
    """
    classes = classes_of(scores, valid, among, first, last)
    batch, heads, tokens = scores.shape
    flat = scores.reshape(batch * heads, tokens)
    classes = classes[:, None].expand(batch, heads, tokens).reshape(batch * heads, tokens)
    keep = _order.largest(_order.pack(classes, flat, classes > PADDING), k)
    return indices_of(keep, k).reshape(batch, heads, k)


def classes_of(scores: Tensor, valid: Tensor | None, among: Tensor | None, first: int, last: int) -> Tensor:
    """int64 [B, T]: PADDING, CHOSEN for tokens that are up for choice, and STAYS; arguments as above."""
    if scores.dim() != 3:
        raise ValueError(f"scores must be [B, H, T], not {list(scores.shape)}")
    batch, _, tokens = scores.shape
    for mask in (valid, among):
        if mask is not None and (mask.dtype != torch.bool or mask.dim() != 2):
            raise ValueError(f"a token mask must be bool [B, T], not {mask.dtype} {list(mask.shape)}")
    real = torch.ones(batch, tokens, dtype=torch.bool, device=scores.device) if valid is None else valid
    rank = real.cumsum(1)
    ends = real & ((rank <= first) | (rank > rank[:, -1:] - last))
    stays = ends if among is None else ends | ~among
    return torch.where(stays, STAYS, torch.where(real, CHOSEN, PADDING))


keep_keys = _library.define(
    "keep_keys(Tensor scores, Tensor? valid, Tensor? among, int first, SymInt last, SymInt k) -> Tensor",
    reference,
    triton="triton_keep_keys",
)
