"""tokred::slot_positions: for each frequency the position of one of the tokens that a merged token is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _library


def reference(positions: Tensor, members: Tensor, axes: Sequence[int], slots: Sequence[int]) -> Tensor:
    """Look positions of members up: result[b, l, j] = positions[b, axes[j], members[b, l, slots[j]]].

    Positional preservation embedding (PPE, 2025): a merged token has K slots, each with the position of a member, and
    each slot a share of the frequencies of each axis.

    Args:
        positions: integers [B or 1, A, T], A coordinates of T old tokens.
        members: int64 [B, T', K], old tokens; a token that was not merged repeats itself.
        axes, slots: for each of P frequencies a coordinate in [0, A) and a slot in [0, K).

    Returns:
        int64 [B, T', P].

    Raises:
        ValueError: the shapes do not fit, or a coordinate or slot is out of range.
    """
    if positions.dim() != 3 or members.dim() != 3 or len(axes) != len(slots):
        raise ValueError(f"positions {list(positions.shape)}, members {list(members.shape)}, {len(axes)} frequencies")
    if not all(0 <= a < positions.shape[1] for a in axes) or not all(0 <= s < members.shape[2] for s in slots):
        raise ValueError(f"axes {list(axes)} and slots {list(slots)} of {list(positions.shape)}, {list(members.shape)}")
    batch, tokens, width = members.shape
    index = members.reshape(batch, tokens * width)
    rows = [p.long().expand(batch, -1).gather(1, index).view(batch, tokens, width) for p in positions.unbind(1)]
    return torch.stack([rows[a].select(2, s) for a, s in zip(axes, slots, strict=True)], 2)


slot_positions = _library.define(
    "slot_positions(Tensor positions, Tensor members, int[] axes, int[] slots) -> Tensor", reference
)
