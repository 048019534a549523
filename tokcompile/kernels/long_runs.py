"""tokred::long_runs: the tokens of a mask that stand in runs of a length or more."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import _library


def reference(mask: Tensor, length: int) -> Tensor:
    """Leave out of a mask what stands in runs shorter than `length`.

    A run is a stretch of neighbouring True that no True borders on.

    Args:
        mask: bool [B, T].
        length: at least 1, which leaves nothing out.

    Returns:
        bool [B, T].

    Raises:
        ValueError: length is below 1.
    """
    if length < 1:
        raise ValueError(f"a run has at least one token, not {length}")
    if length == 1:
        return mask.clone()
    tokens = mask.shape[1]
    # A window of `length` tokens is full where as many True are counted in it; a token is in a full window where one of
    # those that begin up to `length - 1` tokens before it is full.
    before = F.pad(mask.long(), (length, length - 1)).cumsum(1)
    full = (before[:, length:] - before[:, :-length]) == length
    count = F.pad(full.long(), (1, 0)).cumsum(1)
    return (count[:, length : length + tokens] - count[:, :tokens]) > 0


long_runs = _library.define("long_runs(Tensor mask, int length) -> Tensor", reference)
