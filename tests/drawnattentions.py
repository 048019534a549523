"""Attentions that tests of kernels draw by hypothesis."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

MASKS = st.sampled_from(["none", "none", "bool", "rows", "padding", "added", "lowest", "half", "plane"])


def mask_of(kind: str, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    """Masks of all broadcast shapes, some of whose rows hide all."""
    shapes = {
        "bool": (batch, heads, queries, keys),
        "rows": (1, 1, queries, 1),
        "padding": (batch, 1, 1, keys),
        "added": (batch, 1, queries, keys),
        "lowest": (batch, 1, 1, keys),
        "half": (1, heads, queries, keys),
        "plane": (queries, keys),
    }
    if kind == "none":
        return None
    seen = torch.rand(shapes[kind]) > 0.4
    if kind in ("bool", "rows", "padding", "plane"):
        return seen
    hidden = torch.finfo(torch.float32).min if kind == "lowest" else -torch.inf
    added = torch.where(seen, torch.randn(shapes[kind]), hidden)
    return added.to(torch.bfloat16) if kind == "half" else added


@st.composite
def attentions(draw: Any) -> dict[str, Any]:
    """Queries and keys of any strides, longer than a tile and not, and what hides them."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    batch, shared, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    queries, keys, depth = draw(st.integers(1, 37)), draw(st.integers(1, 37)), draw(st.sampled_from([1, 8, 20]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    query = torch.randn(batch, shared * group, queries, depth).to(dtype) * draw(st.sampled_from([1, 9]))
    key = torch.randn(batch, keys, shared, depth).to(dtype).transpose(1, 2)
    if draw(st.booleans()):
        query, key = query.mT.contiguous().mT, torch.cat([key, key], 3)[..., :depth]
    return {
        "query": query,
        "key": key,
        "mask": mask_of(draw(MASKS), batch, shared * group, queries, keys),
        "is_causal": draw(st.booleans()),
        "softcap": draw(st.sampled_from([0.0, 2.0])),
        "sinks": draw(st.sampled_from([None, (shared * group,), (batch, shared * group)])),
        "few": draw(st.booleans()),
        "part": draw(st.sampled_from([16, 256])),
        "kept": draw(st.booleans()),
    }
