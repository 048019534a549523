"""Launches of kernels in which a program walks one row of flags and writes a list of whole numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton


def tuned(kernel: Any) -> Any:
    """A kernel with what it may read at a time: BLOCK flags."""
    return _triton_tiles.autotuned(
        kernel, ("BLOCK",), [(1024, 4, 1), (2048, 8, 1), (4096, 8, 1), (4096, 16, 1)], (), 64
    )


def listed(kernel: Any, flags: Tensor, length: Any) -> Tensor:
    """What a kernel lists of each row of flags.

    Args:
        kernel: `tuned`; takes flags, the result, strides of the flags, T, length and BLOCK; writes all of a row.
        flags: bool [B, T], any strides.
        length: static or symbolic.

    Returns:
        int64 [B, length].
    """
    batch, tokens = flags.shape
    out = torch.empty((batch, length), dtype=torch.int64, device=flags.device)
    if not (isinstance(length, int) and length == 0):
        wrap_triton(kernel)[(batch,)](flags, out, *flags.stride(), tokens, length)
    return out
