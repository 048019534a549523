"""received_by_sums: attention received where the output's kernel hands on its log-sum-exp; no pass inserts it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library
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
    mask: Tensor | None = None,
    softcap: float = 0.0,
    peaks: Tensor | None = None,
) -> Tensor:
    """Reduce exp(cap(query @ key^T * scale) + mask - sums) over query rows, then over heads.

    With the log-sum-exp of each row, which flash attention knows when it is done (Dao et al. 2022, algorithm 1), a
    probability takes one product: half of what `attention_received` computes.

    Args:
        query, key, rows, scale, is_causal, heads, reduce, mask, softcap: as for `attention_received`.
        sums: float32 [B, H, Tq], the natural logarithm of each row's sum of exponentials, a sink's among them. A row
            without one, NaN or infinite, sees nothing.
        peaks: float32 [B, H, Tq], what the exponents of these sums were less by, times log2(e), as `attend_with_sums`
            returns them; None: they are the log-sum-exp itself.

    Returns:
        float32 [B, Tk].

    Raises:
        ValueError: shapes that do not fit, unknown `heads` or `reduce`.
    """
    check(query, sums, peaks)
    together = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}

    def columns(hidden: Tensor | None) -> Tensor:
        logits = _attention.base2(query, key, hidden, scale, is_causal, softcap)
        seen = torch.isfinite(sums)[..., None]
        if rows is not None:
            seen = seen & rows[:, None, :, None]
        less, share = split(sums, peaks)
        weights = torch.where(seen, torch.exp2(logits - less[..., None]) * share[..., None], 0.0)
        return together[heads](weights.sum(2), 1)[:, None]

    return reduced(columns, query, key, mask, rows, heads, reduce)


def check(query: Tensor, sums: Tensor, peaks: Tensor | None) -> None:
    """Refuse sums or peaks that are not those of the rows. Raises ValueError."""
    for name, each in (("sums", sums), ("peaks", sums if peaks is None else peaks)):
        if query.dim() != 4 or each.shape != query.shape[:3] or each.dtype != torch.float32:
            raise ValueError(f"{name} must be float32 {list(query.shape[:3])}, not {each.dtype} {list(each.shape)}")


def split(sums: Tensor, peaks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What to take from base-2 exponents, and what to multiply their powers by, to make probabilities of them."""
    if peaks is None:
        return sums * _attention.LOG2E, torch.ones_like(sums)
    return peaks, torch.exp(-sums)


_library.define_kernel(
    "received_by_sums(Tensor query, Tensor key, Tensor sums, Tensor? rows, float scale, bool is_causal, str heads, "
    "str reduce, Tensor? mask=None, float softcap=0.0, Tensor? peaks=None) -> Tensor",
    reference,
    triton="triton_received_by_sums",
)
