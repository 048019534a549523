"""tokred::nearest_kept: the kept token that each dropped one is most alike."""

from __future__ import annotations

from torch import Tensor

from . import _cosine, _library


def reference(kept: Tensor, gone: Tensor) -> Tensor:
    """Number of the kept token with the largest cosine; the lowest wins a tie.

    Args:
        kept, gone: real [B, n, C] and [B, M, C], compared as float32; a zero vector has cosine 0 to all.

    Returns:
        int64 [B, M], in [0, n).

    Raises:
        ValueError: values of other shapes.
    """
    return _cosine.cosines(kept, gone).argmax(1)


nearest_kept = _library.define("nearest_kept(Tensor kept, Tensor gone) -> Tensor", reference)
