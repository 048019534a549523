"""Hide keys from attention: slots of a sequence that hold no token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.editing.edit import Editor
from tokcompile.errors import EditError
from tokcompile.program import place
from tokcompile.sites.attention import Attention, softmax_of
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
tokred = torch.ops.tokred


class Hiding:
    """One set of keys that some attentions of a graph must not see; attentions that share a mask share the new one.

    Attributes:
        seen: bool [B, Tk], the keys that they see.
        anew: whether masks are made of that and of causality alone, since what they were made of does not fit the
            keys; else keys that a mask hides stay hidden.
    """

    def __init__(self, editor: Editor, reach: Reach, seen: Node, *, anew: bool = False) -> None:
        self.editor, self.reach, self.seen, self.anew = editor, reach, seen, anew
        self._made: dict[Any, Node] = {}

    def apply(self, sites: Iterable[Attention]) -> None:
        """Hide the keys from attentions, given in graph order.

        Raises:
            EditError: one is spelled in a way that takes no further mask.
        """
        for site in sites:
            with self.editor.before(self._entry(site)):
                self._apply_one(site)

    def _entry(self, site: Attention) -> Node:
        """The first node of a site that may read a mask."""
        readers = [u for u in site.mask.users if self._inside(u, site)] if site.mask is not None else []
        return min([site.node, *readers], key=lambda n: n._sort_key)

    def _inside(self, user: Node, site: Attention) -> bool:
        known = user in self.reach.order
        return known and self.reach.above(user, site.node) and self.reach.above(site.query, user)

    def _apply_one(self, site: Attention) -> None:
        node = site.node
        if node.target is aten.scaled_dot_product_attention.default:
            mask = self._mask(site, site.mask)
            dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
            self.editor.set_args(node, [*node.args[:3], mask, dropout, False])
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
        elif site.padding is not None:
            self.editor.swap_input(node, site.padding, self._padding(site))
        else:
            self._written_out(site)

    def _mask(self, site: Attention, mask: Node | None) -> Node:
        """The mask of a site, of the kind that it had; bool where it had none."""
        kind = None if mask is None else mask.meta["val"].dtype
        key = (kind if self.anew else mask, site.is_causal, self._shape(site))
        if key not in self._made:
            self._made[key] = self._new_mask(site, mask)
        return self._made[key]

    def _shape(self, site: Attention) -> tuple[Any, ...]:
        value = site.query.meta["val"]
        return size_of(value.shape[-2]), value.dtype

    def _new_mask(self, site: Attention, mask: Node | None) -> Node:
        call = self.editor.call
        columns = self.seen
        for _ in range(2):
            columns = call(aten.unsqueeze.default, columns, 1)
        if self.anew or mask is None or site.is_causal:
            causal = self._causal(site)
            columns = columns if causal is None else call(aten.logical_and.default, columns, causal)
        if mask is None:
            return columns
        if not mask.meta["val"].dtype.is_floating_point:
            return columns if self.anew else call(aten.logical_and.default, columns, mask)
        like = {"dtype": mask.meta["val"].dtype, "device": mask.meta["val"].device}
        lowest = call(aten.full.default, [], torch.finfo(like["dtype"]).min, **like)
        shown = call(aten.full.default, [], 0.0, **like) if self.anew else mask
        return call(aten.where.self, columns, shown, lowest)

    def _causal(self, site: Attention) -> Node | None:
        """bool [Tq, Tk]: what a query sees of the keys, of which the last is its own; None for all."""
        queries = self.editor.size(site.query, 2)
        if not site.is_causal and (not self.anew or queries == 1):
            return None
        keys = self.editor.size(site.key, 3 if site.key_transposed else 2)
        device = self.seen.meta["val"].device
        ones = self.editor.call(aten.full.default, [queries, keys], True, dtype=torch.bool, device=device)
        return self.editor.call(aten.tril.default, ones, self.editor.arithmetic(lambda k, q: k - q, keys, queries))

    def _padding(self, site: Attention) -> Node:
        if self.anew:
            return self.seen
        keys, columns = site.key.meta["val"].shape[2], site.padding.meta["val"].shape[1]
        if not same(size_of(keys), size_of(columns)):
            raise EditError(
                "a padding mask that is longer than the keys does not say which of them are hidden",
                where=[place(site.node)],
                found=f"{columns} columns and {keys} keys",
            )
        if site.padding not in self._made:
            real = self.editor.call(aten.ne.Scalar, site.padding, 0)
            self._made[site.padding] = self.editor.call(aten.logical_and.default, real, self.seen)
        return self._made[site.padding]

    def _written_out(self, site: Attention) -> None:
        softmax = softmax_of(site)
        readers = [u for u in site.mask.users if self._inside(u, site)] if site.mask is not None else []
        if softmax is None or site.partial or site.sinks is not None or not readers:
            raise EditError(
                "keys cannot be hidden from this attention",
                where=[place(site.node)],
                found="scores without a mask, or with sinks or several masks",
                remedy="load the model with fused attention (attn_implementation='sdpa')",
            )
        made = self._mask(site, site.mask)
        for user in readers:
            self.editor.swap_input(user, site.mask, made)
