"""Attention received as half of its work, where the model's own flash attention hands on its log-sum-exp."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Graph, Node

from tokcompile import kernels
from tokcompile.lowering.groupgathers import changes_a_value
from tokcompile.program import arguments

aten = torch.ops.aten
tokred = torch.ops.tokred
SDPA = aten.scaled_dot_product_attention.default
FLASH = aten._scaled_dot_product_flash_attention.default
HALF = (torch.float16, torch.bfloat16)
WIDEST = 256
"""Numbers of a head that flash attention takes at most; a multiple of eight."""
WIDTHS = 8


def share_sums(graph: Graph, nodes: Collection[Node]) -> int:
    """Let attention and attention received of the same queries and keys share the sums of rows.

    `scaled_dot_product_attention` becomes the flash attention that it would choose, which also returns the log-sum-exp
    of each row; and `tokred::attention_received` becomes `tokred_triton::received_by_sums`, which reads it. That is
    done on a GPU, in half precision, without a mask, soft cap or sinks, and without gradients: flash attention has none
    with respect to its sums.

    Args:
        graph: changed in place.
        nodes: operators for which kernels were chosen.

    Returns:
        How many attentions share their sums.
    """
    if torch.is_grad_enabled():
        return 0
    order = {node: number for number, node in enumerate(graph.nodes)}
    count = 0
    for node in nodes:
        if node.target is tokred.attention_received.default and not node._erased:
            site = _site(node, order)
            if site is not None:
                _share(graph, node, site)
                count += 1
    return count


def _site(node: Node, order: dict[Node, int]) -> Node | None:
    """The attention whose queries and keys these are, and that flash attention can take in its place."""
    mine = arguments(node)
    plain = mine["mask"] is None and mine["softcap"] == 0 and mine["sinks"] is None
    for user in mine["query"].users if plain else ():
        if user.target is SDPA and _fits(arguments(user), mine) and _can_move(node, user, order):
            return user
    return None


def _fits(own: dict[str, Any], mine: dict[str, Any]) -> bool:
    query, key, value = (own[name].meta["val"] for name in ("query", "key", "value"))
    scale = own["scale"] if own["scale"] is not None else query.shape[-1] ** -0.5
    same = own["query"] is mine["query"] and own["key"] is mine["key"]
    same = same and own["is_causal"] == mine["is_causal"] and abs(scale - mine["scale"]) <= 1e-6 * abs(scale)
    # Flash attention sees a causal mask from the last token on, this one from the first.
    square = not own["is_causal"] or query.shape[2] == key.shape[2]
    width = query.shape[-1]
    wide = isinstance(width, int) and width == value.shape[-1] and width <= WIDEST and width % WIDTHS == 0
    placed = query.device.type == "cuda" and query.dtype in HALF and query.dtype == key.dtype == value.dtype
    return same and square and wide and placed and own["attn_mask"] is None and own["dropout_p"] == 0


def _can_move(node: Node, site: Node, order: dict[Node, int]) -> bool:
    """Whether the attention can be made where the scores are: what it reads is there, and stays as it is."""
    if site not in order:
        return False
    first, last = sorted((order[node], order[site]))
    there = first == order[site] or all(order.get(each, last) < first for each in site.all_input_nodes)
    return there and not any(changes_a_value(each) for each, number in order.items() if first < number < last)


def _share(graph: Graph, node: Node, site: Node) -> None:
    own, mine = arguments(site), arguments(node)
    first = site if _is_before(graph, site, node) else node
    with graph.inserting_before(first):
        both = graph.call_function(
            FLASH,
            (own["query"], own["key"], own["value"], 0.0, own["is_causal"]),
            {"scale": own["scale"]},
        )
        out, sums = (graph.call_function(operator.getitem, (both, number)) for number in (0, 1))
    query = own["query"].meta["val"]
    out.meta.update(site.meta)
    both.meta["custom"] = site.meta.get("custom", {})
    sums.meta["val"] = query.new_empty(query.shape[:3], dtype=torch.float32)
    how = (mine[name] for name in ("rows", "scale", "is_causal", "heads", "reduce"))
    with graph.inserting_before(node):
        received = graph.call_function(kernels.kernel_op("received_by_sums"), (own["query"], own["key"], sums, *how))
    received.meta.update(node.meta)
    for old, new in ((site, out), (node, received)):
        old.replace_all_uses_with(new)
        graph.erase_node(old)


def _is_before(graph: Graph, one: Node, other: Node) -> bool:
    return next(node for node in graph.nodes if node in (one, other)) is one
