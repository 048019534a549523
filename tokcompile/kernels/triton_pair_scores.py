"""tokred::pair_scores in Triton: of each key only the chosen numbers are read, where they are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from .pair_scores import joined, numbers


@triton.jit
def _scores(
    query, key, index, out, q_batch, q_head, q_depth, k_batch, k_head, k_token, k_depth, i_batch,
    choices, shared, group, keys, count, WIDE: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Products of `group` heads of queries with a tile of keys over `count` numbers: [B, choices * group, keys]."""
    tiles, pid = tl.cdiv(keys, WIDE), tl.program_id(0)
    b, choice = (pid // tiles // choices).to(tl.int64), (pid // tiles % choices).to(tl.int64)
    token, which = pid % tiles * WIDE + tl.arange(0, WIDE), tl.arange(0, NUMBERS)
    there, real = token < keys, which < count
    number = tl.load(index + b * i_batch + choice * count + which, mask=real, other=0)
    spot = key + b * k_batch + choice // shared * k_head
    spot = spot + token.to(tl.int64)[:, None] * k_token + number[None, :] * k_depth
    k = tl.load(spot, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
    for i in range(group):
        head = choice * group + i
        q = tl.load(query + b * q_batch + head * q_head + number * q_depth, mask=real, other=0.0).to(tl.float32)
        at = out + (b * choices * group + head) * keys + token
        tl.store(at, tl.sum(k * q[None, :], 1), mask=there)


_tuned = _triton_tiles.autotuned(_scores, ("WIDE",), [(32, 4, 1), (64, 4, 1), (128, 4, 1), (16, 4, 1)], ("NUMBERS",))


def supports(query: Tensor, key: Tensor, *others: object) -> str | None:
    """Why these arguments of the operator need the reference; None where they do not."""
    return _triton_tiles.unfit(query, key)


def launch(
    query: Tensor, key: Tensor, chosen: Tensor, valid: Tensor | None, start: int, pairs: int, neighbours: bool
) -> Tensor:
    """What the reference computes, with its arguments, result and errors."""
    index = numbers(query, key, chosen, start, pairs, neighbours).contiguous()
    (batch, heads, tokens, _), choices, count = key.shape, index.shape[1], index.shape[2]
    out = torch.empty((batch, query.shape[1], tokens), dtype=torch.float32, device=query.device)
    wrap_triton(_tuned)[lambda meta: (batch * choices * triton.cdiv(tokens, meta["WIDE"]),)](
        query, key, index, out, *query.stride(), *key.stride(), 0 if index.shape[0] == 1 else index.stride(0),
        choices, choices // heads, query.shape[1] // choices, tokens, count,
        NUMBERS=_triton_tiles.power_of_2(count),
    )  # fmt: skip
    return joined(out, heads, choices, valid)
