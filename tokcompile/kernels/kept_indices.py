"""tokred::kept_indices: a keep mask as the ascending indices of a token map."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(keep: Tensor, length: int) -> Tensor:
    """List the positions of True of each row in ascending order.

    Args:
        keep: bool [B, T]; the caller guarantees `length` True in each row.
        length: static or symbolic, >= 0.

    Returns:
        int64 [B, length], contiguous, always within [0, T). A row with fewer True repeats its last one (0 if it has
        none), a row with more is cut.

    Raises:
        ValueError: keep is not bool [B, T].
    """
    if keep.dim() != 2 or keep.dtype != torch.bool:
        raise ValueError(f"keep must be bool [B, T], not {keep.dtype} {list(keep.shape)}")
    batch, tokens = keep.shape
    index = torch.arange(tokens, device=keep.device).expand(batch, tokens)
    # Every token has a slot; those that are not kept share one past the end, so that shapes never depend on data. With
    # room for every token, because TensorRT scatters into tensors no smaller than the indices.
    slot = torch.where(keep, keep.cumsum(1) - 1, length).clamp(max=length)
    last = torch.where(keep, index, 0).amax(1, keepdim=True)
    return last.expand(batch, length + tokens).scatter(1, slot, index)[:, :length].contiguous()


kept_indices = _library.define(
    "kept_indices(Tensor keep, SymInt length) -> Tensor", reference, triton="triton_kept_indices"
)
