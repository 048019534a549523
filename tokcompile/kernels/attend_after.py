"""tokred::attend_after: attention of new tokens to earlier ones, some of which are hidden, and to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _library


def reference(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """Attend from the last T of P + T tokens: to those of the first P that may be seen, to itself and those between.

    Args:
        query: [B, H, T, D], of the last T tokens.
        key, value: [B, H, P + T, D].
        seen: bool [B, P], the earlier tokens that each row sees.

    Returns:
        [B, H, T, D], dtype of query; scores are divided by the square root of D and, as their softmax, computed in
        float32 or wider. Differentiable in query, key and value.

    Raises:
        ValueError: shapes that do not fit, or `seen` that is not bool.
    """
    if any(x.dim() != 4 for x in (query, key, value)) or seen.dim() != 2 or seen.dtype != torch.bool:
        shapes = [list(x.shape) for x in (query, key, value, seen)]
        raise ValueError(f"query, key, value and seen must be three of [B, H, T, D] and bool [B, P], not {shapes}")
    new, wide = query.shape[2], torch.promote_types(query.dtype, torch.float32)
    scores = query.to(wide) @ key.to(wide).transpose(2, 3) * query.shape[3] ** -0.5
    own = torch.arange(new, device=query.device)
    own = (own <= own[:, None]).expand(query.shape[0], 1, new, new)
    mask = torch.cat([seen[:, None, None].expand(-1, 1, new, -1), own], -1)
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return (shares @ value.to(wide)).to(query.dtype)


attend_after = _library.define("attend_after(Tensor query, Tensor key, Tensor value, Tensor seen) -> Tensor", reference)
