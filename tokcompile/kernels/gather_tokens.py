"""tokred::gather_tokens: apply a token map's `source` to one dimension of a value."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(x: Tensor, source: Tensor, dim: int, batch_dim: int) -> Tensor:
    """Replace the T tokens along `dim` by those that `source` names, per batch row.

    Args:
        x: any rank and dtype, T along `dim`, B or 1 along `batch_dim` (1 is broadcast; a value without a batch
            dimension is given one of size 1 by the caller).
        source: int64 [B, T'], the old index of each new token, in [0, T). -1, a fresh token, is not used yet: what it
            yields is unspecified.
        dim, batch_dim: two different dimensions of x; negative ones count from the end.

    Returns:
        x's dtype; x's shape with T' along `dim` and B along `batch_dim`. Contiguous.

    Raises:
        ValueError: source is not [B, T'], or dim and batch_dim are equal or out of range.
    """
    rank = x.dim()
    if source.dim() != 2:
        raise ValueError(f"source must be int64 [B, T'], not {list(source.shape)}")
    if not (-rank <= dim < rank and -rank <= batch_dim < rank) or dim % rank == batch_dim % rank:
        raise ValueError(f"dim {dim} and batch_dim {batch_dim} must be two dimensions of a value of rank {rank}")
    dim, batch_dim = dim % rank, batch_dim % rank
    batch, length = source.shape
    shape = list(x.shape)
    shape[batch_dim] = batch
    x = x.expand(shape)
    if dim == batch_dim + 1:
        # The common case. Adjacent index dimensions stay in place, and whole trailing rows are copied.
        row = torch.arange(batch, device=source.device)[:, None]
        return torch.ops.aten.index.Tensor(x, [None] * batch_dim + [row, source]).contiguous()
    shape[dim] = length
    index = source if batch_dim < dim else source.transpose(0, 1)
    at = [1] * rank
    at[batch_dim], at[dim] = batch, length
    return x.gather(dim, index.reshape(at).expand(shape))


gather_tokens = _library.define(
    "gather_tokens(Tensor x, Tensor source, int dim, int batch_dim) -> Tensor", reference, triton="triton_gather_tokens"
)
