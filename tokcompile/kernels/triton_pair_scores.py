"""tokred::pair_scores in Triton: of each key only the chosen numbers count, and where they are few only these are read.

A GPU's memory is read in sectors: where the chosen numbers may touch all sectors of a key, keys are read whole, in wide
pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from .pair_scores import joined, numbers

SECTOR = 32
"""Bytes that a GPU reads from its memory at a time."""


@triton.jit
def _scores(
    query, key, chosen, out, q_batch, q_head, q_depth, k_batch, k_head, k_token, k_depth, c_batch,
    choices, shared, group, keys, count, WIDE: tl.constexpr, NUMBERS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Products of `group` heads of queries with a tile of keys over chosen numbers: [B, choices * group, keys].

    WHOLE: `chosen` says of each of `count` numbers whether it counts, else it lists `count` of them.
    """
    tiles, pid = tl.cdiv(keys, WIDE), tl.program_id(0)
    b, choice = (pid // tiles // choices).to(tl.int64), (pid // tiles % choices).to(tl.int64)
    token, which = pid % tiles * WIDE + tl.arange(0, WIDE), tl.arange(0, NUMBERS)
    there, inside = token < keys, which < count
    found = tl.load(chosen + b * c_batch + choice * count + which, mask=inside, other=0)
    if WHOLE:
        number, counts = which.to(tl.int64), found != 0
    else:
        number, counts = found, inside
    spot = key + b * k_batch + choice // shared * k_head
    spot = spot + token.to(tl.int64)[:, None] * k_token + number[None, :] * k_depth
    k = tl.load(spot, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    # What does not count may hold anything, NaN too.
    k = tl.where(counts[None, :], k, 0.0)
    for i in range(group):
        head = choice * group + i
        q = tl.load(query + b * q_batch + head * q_head + number * q_depth, mask=counts, other=0.0).to(tl.float32)
        at = out + (b * choices * group + head) * keys + token
        tl.store(at, tl.sum(k * q[None, :], 1), mask=there)


_tuned = _triton_tiles.autotuned(
    _scores, ("WIDE",), [(32, 4, 1), (64, 4, 1), (128, 4, 1), (16, 4, 1)], ("NUMBERS", "WHOLE")
)


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(
    query: Tensor, key: Tensor, chosen: Tensor, valid: Tensor | None, start: int, pairs: int, neighbours: bool
) -> Tensor:
    """What the reference computes, with its arguments, result and errors."""
    index = numbers(query, key, chosen, start, pairs, neighbours).contiguous()
    (batch, heads, tokens, width), choices, count = key.shape, index.shape[1], index.shape[2]
    out = torch.empty((batch, query.shape[1], tokens), dtype=torch.float32, device=query.device)
    whole = count * SECTOR >= width * key.dtype.itemsize
    if whole:
        none = torch.zeros((*index.shape[:2], width), dtype=torch.bool, device=index.device)
        index, count = none.scatter(2, index, True), width
    wrap_triton(_tuned)[lambda meta: (batch * choices * triton.cdiv(tokens, meta["WIDE"]),)](
        query, key, index, out, *query.stride(), *key.stride(), 0 if index.shape[0] == 1 else index.stride(0),
        choices, choices // heads, query.shape[1] // choices, tokens, count,
        NUMBERS=_triton_tiles.power_of_2(count), WHOLE=whole,
    )  # fmt: skip
    return joined(out, heads, choices, valid)
