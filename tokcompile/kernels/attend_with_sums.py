"""attend_with_sums: attention that also hands on the sums of its rows; no pass inserts it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _attention, _library


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax(cap(query @ key^T * scale) + mask) @ value, and what each row was divided by.

    Flash attention (Dao et al. 2022, algorithm 1) knows the log-sum-exp of each row when it is done:
    `received_by_sums` makes probabilities of it. It comes in two parts, because one float32 cannot hold both a mask of
    -1e9 or less, which hides a whole row, and the logarithm of how many keys then share that row.

    Args:
        query: float [B, H, Tq, D].
        key, value: [B, Hkv, Tk, D] and [B, Hkv, Tk, Dv], H a multiple of Hkv (head h reads head h // (H // Hkv)).
        mask: bool (True is seen) or additive float, broadcastable to [B, H, Tq, Tk]; or None.
        scale: factor on the logits, usually D ** -0.5.
        is_causal: row i sees keys 0..i, as scaled_dot_product_attention has it.
        softcap: logits become softcap * tanh(logits / softcap) before the mask; 0: none.
        sinks: float [H] or [B, H], a logit of each head beside those of the keys, which gives its share to none; None
            without.

    Returns:
        Tokens before heads, as flash attention lays them out and models read them next: [B, Tq, H, Dv], of the dtype of
        `value`. A row that sees nothing is 0, as scaled_dot_product_attention has it.

        Sums, float32 [B, H, Tq]: the natural logarithm of the sum of 2 ** (logit * log2(e) - peak) over the keys of a
        row, and of its sink. -inf where the row sees nothing and has no sink.

        Peaks, float32 [B, H, Tq]: the largest logit of a row times log2(e); the lowest float where it sees nothing. The
        log-sum-exp is peak * ln(2) + sum.

    Raises:
        ValueError: shapes that do not fit.
    """
    four_d = check(query, key, value, mask)
    logits = _attention.base2(query, key, four_d, scale, is_causal, softcap)
    peaks = logits.amax(-1).clamp(min=_attention.LOWEST)
    sink = _attention.sinks_by_row(sinks, *query.shape[:2])
    if sink is not None:
        sink = (sink * _attention.LOG2E)[..., None]
        peaks = torch.maximum(peaks, sink)
    weights = torch.exp2(logits - peaks[..., None])
    total = weights.sum(-1) + (0 if sink is None else torch.exp2(sink - peaks))
    seen = total > 0
    wide = value.to(torch.float32).repeat_interleave(query.shape[1] // key.shape[1], 1)
    safe = torch.where(seen, total, 1.0)
    out = (weights / safe[..., None] @ wide).to(value.dtype)
    return out.transpose(1, 2).contiguous(), torch.where(seen, safe.log(), -torch.inf), peaks


def check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor | None:
    """Refuse shapes that do not fit, and return the mask with four dimensions. Raises ValueError."""
    _attention.check(query, key, mask, "mean")
    fits = value.dim() == 4 and value.shape[:2] == key.shape[:2]
    # Lengths of caches can be symbols of which nothing is known yet.
    torch._check_value(
        fits and value.shape[2] == key.shape[2],
        lambda: f"value must be [B, Hkv, Tk, Dv] for keys {list(key.shape)}, not {list(value.shape)}",
    )
    return None if mask is None else _attention.four_d(mask)


_library.define_kernel(
    "attend_with_sums(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal, "
    "float softcap=0.0, Tensor? sinks=None) -> (Tensor, Tensor, Tensor)",
    reference,
    triton="triton_attend_with_sums",
)
