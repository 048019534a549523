"""tokred::key_viewers in Triton: the mask is read once, and no plane of rows by keys is written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _attention, _triton_columns, _triton_tiles
from ._triton import wrap_triton
from ._triton_column_passes import rows_at
from .key_attention import last_places
from .key_viewers import check

_HIDDEN = tl.constexpr(_attention.LOWEST / 2)


@triton.jit
def _viewers(
    mask, rows, out, m_batch, m_query, m_key, count, keys,
    TALL: tl.constexpr, WIDE: tl.constexpr, MASK: tl.constexpr, LISTED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """How many of the rows that count see each key: [B, keys]."""
    tiles, pid = tl.cdiv(keys, WIDE), tl.program_id(0)
    b, column = (pid // tiles).to(tl.int64), pid % tiles * WIDE + tl.arange(0, WIDE)
    inside = column < keys
    mask += b * m_batch
    begin = 0
    if CAUSAL and LISTED != 2:
        begin = pid % tiles * WIDE // TALL * TALL
    viewers = tl.zeros([WIDE], tl.float32)
    for start in range(begin, count, TALL):
        index = start + tl.arange(0, TALL)
        at, counted = rows_at(rows, b, index, count, count, LISTED)
        seen = counted[:, None] & inside[None, :]
        if MASK != 0:
            spot = mask + at.to(tl.int64)[:, None] * m_query + column.to(tl.int64)[None, :] * m_key
            value = tl.load(spot, mask=seen, other=0)
            seen = seen & ((value != 0) if MASK == 1 else (value.to(tl.float32) > _HIDDEN))
        if CAUSAL:
            seen = seen & (column[None, :] <= at[:, None])
        viewers += tl.sum(seen.to(tl.float32), 0)
    tl.store(out + b * keys + column, viewers, mask=inside)


_tuned = _triton_tiles.autotuned(
    _viewers, ("TALL", "WIDE"), [(32, 64, 4, 3), (16, 128, 4, 3), (64, 32, 4, 2)], ("MASK", "LISTED", "CAUSAL")
)


def viewers(
    query: Tensor, keys: int, hidden: Tensor | None, rows: Tensor | None, places: Tensor | None, is_causal: bool
) -> Tensor:
    """float32 [B, keys]: how many rows see each key.

    Args:
        query: [B, H, Tq, D]; only its shape and device matter.
        hidden: the mask of all heads, [B or 1, H or 1, Tq or 1, Tk or 1]; None.
        rows, places: as for `_triton_columns.over_heads`.
    """
    batch, _, tokens, _ = query.shape
    listed, chosen = _triton_columns.list_of(rows, places)
    out = torch.empty((batch, keys), dtype=torch.float32, device=query.device)
    mask = out if hidden is None else hidden.expand(batch, -1, tokens, keys)[:, 0]
    looked = tokens if places is None else places.shape[1]
    strides = (0, 0, 0) if hidden is None else mask.stride()
    wrap_triton(_tuned)[lambda meta: (batch * triton.cdiv(keys, meta["WIDE"]),)](
        mask, out if chosen is None else chosen, out, *strides, looked, keys,
        MASK=_triton_tiles.mask_kind(hidden), LISTED=listed, CAUSAL=is_causal,
    )  # fmt: skip
    return out


def supports(*arguments: object) -> str | None:
    """Why these arguments of the operator need the reference; None: any will do."""
    return None


def launch(
    query: Tensor, key: Tensor, mask: Tensor | None, valid: Tensor | None, window: int, is_causal: bool
) -> Tensor:
    """What the reference counts, with its arguments, results and errors."""
    check(query, key, mask, valid)
    hidden = None if mask is None else _attention.four_d(mask)
    places = last_places(valid, query.shape[0], query.shape[2], window, query.device) if window else None
    return viewers(query, key.shape[2], hidden, None if window else valid, places, is_causal)
