"""Add to the scores of an attention, the same for all queries and heads: one number for each key."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from tokcompile.editing.edit import Editor
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.attention import Attention, softmax_of

aten = torch.ops.aten
tokred = torch.ops.tokred


def bias_keys(editor: Editor, site: Attention, bias: Node) -> None:
    """Let an attention add a number to the score of each key.

    Args:
        bias: float32 [B, Tk]; -inf hides a key.

    Raises:
        EditError: the attention is spelled in a way that takes no such number.
    """
    node, softmax = site.node, softmax_of(site)
    with editor.before(node if softmax is None else softmax):
        wide = editor.call(aten.to.dtype, bias, site.query.meta["val"].dtype)
        for _ in range(2):
            wide = editor.call(aten.unsqueeze.default, wide, 1)
        if node.target is aten.scaled_dot_product_attention.default:
            mask = _composed(editor, site, site.mask, wide, site.is_causal)
            node.args = (*node.args[:3], mask, node.args[4] if len(node.args) > 4 else 0.0, False)
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}
            return
        if site.padding is not None:
            _replace_registered(editor, site, wide)
            return
        _written_out(editor, site, softmax, wide)


def _composed(editor: Editor, site: Attention, mask: Node | None, bias: Node, causal: bool) -> Node:
    if causal:
        rows, columns = editor.size(site.query, 2), editor.size(site.key, 2)
        device = bias.meta["val"].device
        seen = editor.call(aten.full.default, [rows, columns], True, dtype=torch.bool, device=device)
        seen = editor.call(aten.tril.default, seen)
        mask = seen if mask is None else editor.call(aten.logical_and.default, mask, seen)
    if mask is None:
        return bias
    if mask.meta["val"].dtype == torch.bool:
        lowest = editor.call(aten.full.default, [], -math.inf, **_like(bias))
        return editor.call(aten.where.self, mask, bias, lowest)
    return editor.call(aten.add.Tensor, mask, bias)


def _like(value: Node) -> dict[str, object]:
    return {"dtype": value.meta["val"].dtype, "device": value.meta["val"].device}


def _replace_registered(editor: Editor, site: Attention, bias: Node) -> None:
    """An attention under the caller's padding mask, as a fused one with a mask of its own."""
    keys, queries = editor.size(site.key, 2), editor.size(site.query, 2)
    mask = editor.call(aten.slice.Tensor, site.padding, 1, 0, keys)
    mask = editor.call(aten.ne.Scalar, mask, 0)
    for dim in (1, 1):
        mask = editor.call(aten.unsqueeze.default, mask, dim)
    if site.is_causal:
        device = bias.meta["val"].device
        ones = editor.call(aten.full.default, [queries, keys], True, dtype=torch.bool, device=device)
        ahead = editor.arithmetic(lambda k, q: k - q, keys, queries)
        mask = editor.call(aten.logical_and.default, mask, editor.call(aten.tril.default, ones, ahead))
    mask = _composed(editor, site, mask, bias, False)
    groups = site.query.meta["val"].shape[1] != site.key.meta["val"].shape[1]
    made = editor.call(
        aten.scaled_dot_product_attention.default,
        site.query,
        site.key,
        site.value,
        mask,
        0.0,
        False,
        scale=site.scale,
        enable_gqa=bool(groups),
    )
    editor.replace(site.node, made)


def _written_out(editor: Editor, site: Attention, softmax: Node | None, bias: Node) -> None:
    if softmax is None or site.sinks is not None or site.partial or site.softcap:
        raise EditError(
            "the scores of this attention cannot be added to",
            where=[place(site.node)],
            found="scores with sinks, a cap or several masks",
            remedy="load the model with fused attention (attn_implementation='sdpa')",
        )
    scores = softmax.args[0]
    wide = editor.call(aten.to.dtype, bias, scores.meta["val"].dtype)
    editor.swap_input(softmax, scores, editor.call(aten.add.Tensor, scores, wide))
