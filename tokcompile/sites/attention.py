"""Attention sites: a fused call, a registered `tokred::attention`, or matmul, scale, mask, softmax, matmul by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tokcompile.axes.context import arg

aten = torch.ops.aten
_THROUGH = {aten.dropout.default, aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_ADD = {aten.add.Tensor, aten.add_.Tensor}
_VIEWS = {aten.view.default, aten.reshape.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten.softmax.Dim if hasattr(aten.softmax, "Dim") else None}


@dataclass(frozen=True, eq=False)
class Attention:
    """One attention computation.

    Attributes:
        node: its result, [B, H, Tq, D].
        query, key, value: [B, H, Tq, D], [B, H or Hkv, Tk, D], [B, H or Hkv, Tk, Dv], after rotary, norm and cache.
        mask: bool (True attends) or additive, broadcastable to [B, H, Tq, Tk]; None without one.
        padding: two-dimensional padding mask [B, Tk or longer] of a registered attention; None without one.
        scale: what scores are multiplied by.
        is_causal: the flag of the fused call.
        softcap: tanh cap of the scores, 0 without one.
        sinks: [B, H, Tq, 1], logits beside those of the keys that take a share of the attention; None without.
        partial: `mask` is one of several that are added, perhaps in another shape: weights cannot be computed from it.
        key_transposed: `key` is [B, H, D, Tk], as written-out attention may have it.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None = None
    padding: Node | None = None
    scale: float = 1.0
    is_causal: bool = False
    softcap: float = 0.0
    key_transposed: bool = False
    sinks: Node | None = None
    partial: bool = False


def find_attention(graph: Graph) -> list[Attention]:
    """All attention sites, in graph order."""
    found = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        site = _fused(node) or _registered(node) or _routed(node) or _by_hand(node)
        if site is not None:
            found.append(site)
    return found


def _default_scale(query: Node) -> float:
    return float(query.meta["val"].shape[-1]) ** -0.5


def _fused(node: Node) -> Attention | None:
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    scale = node.kwargs.get("scale")
    return Attention(
        node,
        *node.args[:3],
        mask=arg(node, 3, "attn_mask"),
        is_causal=bool(arg(node, 5, "is_causal", False)),
        scale=_default_scale(node.args[0]) if scale is None else float(scale),
    )


def _registered(node: Node) -> Attention | None:
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name != "tokred::attention":
        return None
    query, key, value, padding, scale, causal = node.args[:6]
    return Attention(node, query, key, value, padding=padding, scale=float(scale), is_causal=bool(causal))


def _routed(node: Node) -> Attention | None:
    """Attention to keys that an earlier edit chose, of all tokens alike or of each head."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.name == "tokred::attend":
        query, key, value, mask, scale, softcap = node.args[:6]
    elif node.target._schema.name == "tokred::attend_owned":
        query, key, value, _, mask, scale, softcap = node.args[:7]
    else:
        return None
    return Attention(node, query, key, value, mask=mask, scale=float(scale), softcap=float(softcap), partial=True)


def _skip(node: Any) -> Any:
    while isinstance(node, Node) and node.target in _THROUGH:
        node = node.args[0]
    return node


def _by_hand(node: Node) -> Attention | None:
    """matmul(softmax(cap(q k^T * scale) + masks), v), each part but the products and the softmax optional."""
    if node.target not in _PRODUCTS:
        return None
    weights, value = _skip(node.args[0]), node.args[1]
    sunk = isinstance(weights, Node) and weights.target is aten.slice.Tensor
    weights = _skip(weights.args[0]) if sunk else weights
    if not isinstance(weights, Node) or weights.target not in _SOFTMAX:
        return None
    scores, sinks = _without_sinks(_skip(weights.args[0])) if sunk else (_skip(weights.args[0]), None)
    if sunk and sinks is None:
        return None
    masked, cap = scores, 0.0
    scores, masks, viewed = _unmasked(masked)
    scores, scale = _scaled(scores)
    if scores.target is aten.tanh.default:
        cap = scale
        scores, scale = _scaled(_skip(scores.args[0]))
        scale *= cap  # tanh(scores * scale / cap) * cap: the inner factor carries both
    back = not viewed or scores.meta["val"].shape == masked.meta["val"].shape
    if scores.target not in _PRODUCTS or not back:
        return None
    query, key = scores.args
    transposed = not (key.target is aten.transpose.int and {d % 4 for d in key.args[1:]} == {2, 3})
    return Attention(
        node,
        query,
        key if transposed else key.args[0],
        value,
        mask=masks[0] if masks else None,
        scale=scale,
        softcap=cap,
        key_transposed=transposed,
        sinks=sinks,
        partial=viewed or len(masks) > 1,
    )


def _unmasked(scores: Node) -> tuple[Node, list[Node], bool]:
    """Take masks off that are added to scores, and views there and back, as to add one for each window.

    Returns:
        The scores, the masks from the last on, and whether there were views.
    """
    masks: list[Node] = []
    viewed = False
    while True:
        if scores.target in _ADD and isinstance(scores.args[1], Node):
            masks.append(scores.args[1])
        elif scores.target in _VIEWS:
            viewed = True
        else:
            return scores, masks, viewed
        scores = _skip(scores.args[0])


def _without_sinks(scores: Node) -> tuple[Node, Node | None]:
    """Scores of the keys, and the logits that stand beside them as one more column, which the model cuts off again."""
    if scores.target is aten.sub.Tensor:  # less their maximum, which the softmax does by itself
        scores = _skip(scores.args[0])
    if scores.target is not aten.cat.default or len(scores.args[0]) != 2:
        return scores, None
    keys, column = scores.args[0]
    return (_skip(keys), column) if column.meta["val"].shape[-1] == 1 else (scores, None)


def _scaled(node: Node) -> tuple[Node, float]:
    """Take multiplications and divisions by numbers off: what is left, and their product."""
    total = 1.0
    while node.target in (aten.mul.Tensor, aten.div.Tensor):
        factor = _number(node.args[1])
        if factor is None:
            break
        total *= factor if node.target is aten.mul.Tensor else 1.0 / factor
        node = _skip(node.args[0])
    return node, total


def _number(value: Any) -> float | None:
    """A constant; also a float of the model that dynamic shapes made an input, on whose value this puts a guard."""
    if isinstance(value, Node):
        value = value.meta.get("val")
        if not isinstance(value, torch.SymFloat) or not value.node.has_hint():
            return None
    return float(value) if isinstance(value, (int, float, torch.SymFloat)) else None


def softmax_of(site: Attention) -> Node | None:
    """The softmax of an attention that is written out; None for a fused one."""
    if site.node.target not in _PRODUCTS:
        return None
    weights = _skip(site.node.args[0])
    weights = _skip(weights.args[0]) if site.sinks is not None else weights  # a slice cuts their column off
    return weights if weights.target in _SOFTMAX else None
