"""tokred::match_pairs in Triton: the best partner of each even token, without the matrix of all likenesses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _triton_tiles
from ._triton import wrap_triton
from ._triton_tiles import dot
from .match_pairs import check, paired


@triton.jit
def _best(
    metric, lengths, likeness, partner, m_batch, m_token, m_depth, l_batch, evens, odds, kept, depth, parts, part,
    TALL: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Of each even token the largest cosine with an odd one of a part, and which that is; the lower wins a tie."""
    tiles, pid = tl.cdiv(evens, TALL), tl.program_id(0)
    which, cut, b = pid % tiles, pid // tiles % parts, (pid // tiles // parts).to(tl.int64)
    even, deep = which * TALL + tl.arange(0, TALL), tl.arange(0, DEEP)
    metric += b * m_batch
    lengths += b * l_batch
    end = tl.minimum(kept + cut * part + part, odds)
    best, found = tl.full([TALL], float("-inf"), tl.float32), tl.zeros([TALL], tl.int32) + kept
    for start in range(kept + cut * part, end, WIDE):
        odd = start + tl.arange(0, WIDE)
        alike = tl.zeros([TALL, WIDE], tl.float32)
        for first in range(0, depth, DEEP):
            inner = (first + deep) < depth
            spot = metric + (2 * even).to(tl.int64)[:, None] * m_token + (first + deep)[None, :] * m_depth
            left = tl.load(spot, mask=(even < evens)[:, None] & inner[None, :], other=0.0)
            spot = metric + (2 * odd + 1).to(tl.int64)[None, :] * m_token + (first + deep)[:, None] * m_depth
            right = tl.load(spot, mask=(odd < end)[None, :] & inner[:, None], other=0.0)
            alike += dot(left, right, EXACT)
        # The length of an even token scales its whole row, and so comes last.
        alike = alike / tl.load(lengths + 2 * odd + 1, mask=odd < end, other=1.0)[None, :]
        alike = tl.where((odd < end)[None, :], alike, float("-inf"))
        most = tl.max(alike, 1)
        first_of = tl.min(tl.where(alike == most[:, None], odd[None, :], odds), 1)
        found = tl.where(most > best, first_of, found)
        best = tl.maximum(best, most)
    best = best / tl.load(lengths + 2 * even, mask=even < evens, other=1.0)
    out = (b * parts + cut) * evens + even
    tl.store(likeness + out, best, mask=even < evens)
    tl.store(partner + out, found.to(tl.int64), mask=even < evens)


_tuned = _triton_tiles.autotuned(
    _best,
    ("TALL", "WIDE"),
    [(64, 128, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3), (32, 64, 4, 3), (32, 32, 4, 2)],
    ("DEEP", "EXACT"),
)


def supports(metric: Tensor, *others: object) -> str | None:
    """Why this metric needs the reference; None where it does not."""
    if metric.dtype not in _triton_tiles.DTYPES:
        return f"it takes a metric of float16, bfloat16 or float32, not {metric.dtype}"
    return None


def launch(metric: Tensor, count: int, leading: int) -> Tensor:
    """What the reference chooses, with its arguments, result and errors; T x T numbers never exist.

    Likenesses are products of the vectors as they are, divided by their lengths, and not of vectors that were divided:
    of partners whose likeness differs by less than rounding another one may win.
    """
    check(metric, count, leading)
    batch, tokens, depth = metric.shape
    if count == 0:
        return torch.arange(tokens, device=metric.device).expand(batch, tokens).contiguous()
    metric = metric.detach()
    length = torch.linalg.vector_norm(metric, dim=-1, dtype=torch.float32)
    length = torch.where(length > 0, length, 1.0)
    evens, odds, kept = (tokens + 1) // 2, tokens // 2, leading // 2
    parts, part = _triton_tiles.parts_of(batch * triton.cdiv(evens, 64), odds - kept)
    likeness = torch.empty((batch, parts, evens), dtype=torch.float32, device=metric.device)
    partner = torch.empty((batch, parts, evens), dtype=torch.int64, device=metric.device)
    exact = metric.dtype == torch.float32
    wrap_triton(_tuned)[lambda meta: (triton.cdiv(evens, meta["TALL"]) * parts * batch,)](
        metric, length, likeness, partner, *metric.stride(), length.stride(0), evens, odds, kept, depth, parts, part,
        DEEP=min(32 if exact else 128, _triton_tiles.width(depth)), EXACT=exact,
    )  # fmt: skip
    best = likeness.amax(1)
    # Parts are in the order of their tokens, so that the lowest index wins here too.
    first = torch.where(likeness == best[:, None], partner, odds).amin(1)
    return paired(best, first, tokens, count, leading)
