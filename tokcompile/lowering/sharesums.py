"""Attention received as half of its work, where the model's own attention hands on the sums of its rows."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
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
KERNEL = "attend_with_sums"
HALF = (torch.float16, torch.bfloat16)
WIDEST = 256
"""Numbers of a head that flash attention takes at most; a multiple of eight."""
WIDTHS = 8


@dataclass(frozen=True, eq=False)
class Sharing:
    """Attention received, and the model's own attention of the same queries and keys.

    Attributes:
        received: a call of `tokred::attention_received`.
        attention: a call of `scaled_dot_product_attention`.
        flash: whether PyTorch's flash attention can take its place; else the kernel `attend_with_sums` may.
    """

    received: Node
    attention: Node
    flash: bool


def sharings(graph: Graph, nodes: Collection[Node]) -> Iterator[Sharing]:
    """Where attention received can take its sums from the model's own attention, in the order of the nodes.

    That is so with the same queries, keys, mask and scale, where the attention can be made in time for the scores. It
    is not so with gradients: there are none with respect to the sums.

    Args:
        nodes: operators for which kernels were chosen.
    """
    if torch.is_grad_enabled():
        return
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in nodes:
        if node.target is tokred.attention_received.default and not node._erased:
            mine = arguments(node)
            for user in mine["query"].users:
                if user.target is SDPA and _is_same(arguments(user), mine) and _can_move(node, user, order):
                    yield Sharing(node, user, _takes_flash(arguments(user)))
                    break


def kernel_arguments(attention: Node) -> tuple[Any, ...]:
    """What `attend_with_sums` takes in the place of an attention."""
    own = arguments(attention)
    return own["query"], own["key"], own["value"], own["attn_mask"], _scale(own), own["is_causal"]


def share_sums(graph: Graph, nodes: Collection[Node], chosen: Collection[str]) -> int:
    """Let attention and attention received of the same queries and keys share the sums of rows.

    `tokred::attention_received` becomes `tokred_triton::received_by_sums`, and `scaled_dot_product_attention` becomes
    what hands on the sums: on a GPU, in half precision and without a mask, the flash attention that it would choose;
    else `tokred_triton::attend_with_sums`, where that was chosen.

    Args:
        graph: changed in place.
        nodes: operators for which kernels were chosen.
        chosen: names of the nodes that kernels were chosen for, attentions among them.

    Returns:
        How many attentions share their sums.
    """
    found: dict[Node, list[Sharing]] = {}
    for each in sharings(graph, nodes):
        if each.flash or each.attention.name in chosen:
            found.setdefault(each.attention, []).append(each)
    for group in found.values():
        _share(graph, group)
    return len(found)


def _scale(own: dict[str, Any]) -> float:
    return own["scale"] if own["scale"] is not None else own["query"].meta["val"].shape[-1] ** -0.5


def _is_same(own: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether attention received has the weights of an attention."""
    query, key, value = (own[name].meta["val"] for name in ("query", "key", "value"))
    scale = _scale(own)
    same = own["query"] is mine["query"] and own["key"] is mine["key"] and own["attn_mask"] is mine["mask"]
    same = same and own["is_causal"] == mine["is_causal"] and abs(scale - mine["scale"]) <= 1e-6 * abs(scale)
    plain = mine["softcap"] == 0 and mine["sinks"] is None and own["dropout_p"] == 0
    # Flash attention sees a causal mask from the last token on, this one from the first.
    square = not own["is_causal"] or query.shape[2] == key.shape[2]
    heads = own["enable_gqa"] or query.shape[1] == key.shape[1]
    return same and plain and square and heads and key.shape[:2] == value.shape[:2]


def _takes_flash(own: dict[str, Any]) -> bool:
    query, key, value = (own[name].meta["val"] for name in ("query", "key", "value"))
    width = query.shape[-1]
    wide = isinstance(width, int) and width == value.shape[-1] and width <= WIDEST and width % WIDTHS == 0
    placed = query.device.type == "cuda" and query.dtype in HALF and query.dtype == key.dtype == value.dtype
    return wide and placed and own["attn_mask"] is None


def _can_move(node: Node, site: Node, order: dict[Node, int]) -> bool:
    """Whether the attention can be made where the scores are: what it reads is there, and stays as it is."""
    if site not in order:
        return False
    first, last = sorted((order[node], order[site]))
    there = first == order[site] or all(order.get(each, last) < first for each in site.all_input_nodes)
    return there and not any(changes_a_value(each) for each, number in order.items() if first < number < last)


def _share(graph: Graph, group: Sequence[Sharing]) -> None:
    """Write one attention, and all that is received of it, anew."""
    site, flash = group[0].attention, group[0].flash
    own, before = arguments(site), [site, *(each.received for each in group)]
    with graph.inserting_before(next(node for node in graph.nodes if node in before)):
        out, sums, peaks = _flash(graph, site) if flash else _attend(graph, site)
    out.meta.update(site.meta)
    site.replace_all_uses_with(out)
    graph.erase_node(site)
    for node in (each.received for each in group):
        mine = arguments(node)
        how = [mine[name] for name in ("rows", "scale", "is_causal", "heads", "reduce")]
        under = () if flash else (own["attn_mask"], 0.0, peaks)
        with graph.inserting_before(node):
            received = graph.call_function(
                kernels.kernel_op("received_by_sums"), (own["query"], own["key"], sums, *how, *under)
            )
        received.meta.update(node.meta)
        node.replace_all_uses_with(received)
        graph.erase_node(node)


def _flash(graph: Graph, site: Node) -> tuple[Node, Node, None]:
    """PyTorch's flash attention in the place of an attention: its result, the log-sum-exp of its rows, no peaks."""
    own = arguments(site)
    both = graph.call_function(
        FLASH, (own["query"], own["key"], own["value"], 0.0, own["is_causal"]), {"scale": own["scale"]}
    )
    out, sums = _parts(graph, both, site, 2)
    return out, sums, None


def _attend(graph: Graph, site: Node) -> tuple[Node, Node, Node]:
    """`attend_with_sums` in the place of an attention: its result, the sums and the peaks of its rows."""
    every = graph.call_function(kernels.kernel_op(KERNEL), kernel_arguments(site))
    laid, sums, peaks = _parts(graph, every, site, 3)
    laid.meta["val"] = site.meta["val"].new_empty(site.meta["val"].transpose(1, 2).shape)
    return graph.call_function(aten.transpose.int, (laid, 1, 2)), sums, peaks


def _parts(graph: Graph, call: Node, site: Node, count: int) -> list[Node]:
    """The results of a call in the place of an attention; all but the first are numbers of rows."""
    call.meta["custom"] = site.meta.get("custom", {})
    made = [graph.call_function(operator.getitem, (call, number)) for number in range(count)]
    query = arguments(site)["query"].meta["val"]
    for each in made[1:]:
        each.meta["val"] = query.new_empty(query.shape[:3], dtype=torch.float32)
    return made
