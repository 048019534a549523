"""received_by_sums: attention received where the output's kernel hands on its log-sum-exp; no pass inserts it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library
from .attention_received import reduced


def reference(
    query: Tensor,
    key: Tensor,
    sums: Tensor,
    rows: Tensor | None,
    scale: float,
    is_causal: bool,
    heads: str,
    reduce: str,
) -> Tensor:
    """Reduce exp(query @ key^T * scale - sums) over query rows, then over heads.

    With the log-sum-exp of each row, which flash attention knows when it is done (Dao et al. 2022, algorithm 1), a
    probability takes one product: half of what `attention_received` computes.

    Args:
        query, key, rows, scale, is_causal, heads, reduce: as for `attention_received`.
        sums: float32 [B, H, Tq], the natural logarithm of each row's sum of exponentials. A row without one, NaN or
            infinite, sees nothing.

    Returns:
        float32 [B, Tk].

    Raises:
        ValueError: shapes that do not fit, unknown `heads` or `reduce`.
    """
    check(query, sums)
    together = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}

    def columns(hidden: Tensor | None) -> Tensor:
        del hidden
        wide = key.to(torch.float32).repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = query.to(torch.float32) @ wide.transpose(2, 3) * scale
        seen = torch.isfinite(sums)[..., None]
        if rows is not None:
            seen = seen & rows[:, None, :, None]
        if is_causal:
            seen = seen & torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).tril()
        weights = torch.where(seen, torch.exp(logits - sums[..., None]), 0.0)
        return together[heads](weights.sum(2), 1)[:, None]

    return reduced(columns, query, key, None, rows, heads, reduce)


def check(query: Tensor, sums: Tensor) -> None:
    """Refuse sums that are not those of the rows. Raises ValueError."""
    if query.dim() != 4 or sums.shape != query.shape[:3] or sums.dtype != torch.float32:
        raise ValueError(f"sums must be float32 {list(query.shape[:3])}, not {sums.dtype} {list(sums.shape)}")


_library.define_kernel(
    "received_by_sums(Tensor query, Tensor key, Tensor sums, Tensor? rows, float scale, bool is_causal, str heads, "
    "str reduce) -> Tensor",
    reference,
    triton="triton_received_by_sums",
)
