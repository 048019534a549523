"""Cache sites: the keys and values that a graph hands back, and those that it was given."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.fx import Node

import tokcompile.kernels  # noqa: F401  registers the operators that edits put on caches
from tokcompile.sites.block import Block
from tokcompile.sites.reach import Reach

aten = torch.ops.aten
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.repeat_interleave.self_int,
}
_CLEARED = {torch.ops.tokred.clear_slots.default}
"""Operators that say in what is handed back which slots are empty; attention reads it as it was."""
_PUTS = {aten.index_copy_.default, aten.index_copy.default}
_GATHER = torch.ops.tokred.gather_tokens.default
SHORTENED = {getattr(torch.ops.tokred, name).default for name in ("gather_keys", "gather_pairs", "merge_keys")}
"""What an eviction puts on what is handed back; attention reads all of it."""
TURNED = torch.ops.tokred.turn_pairs.default
"""What numbers keys by their ranks: put on keys that attention reads, or on what an eviction hands back."""


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of one block, [B, Hkv, T, D], or latents [B, 1, T, R] that they are made from in every step.

    Attributes:
        key, value: what the graph hands back.
        past: the cached keys that it was given; None in a prefill.
        slots: int64 [Tq], where in a buffer of a fixed size the keys of this step are put; None where caches grow. A
            buffer has as many slots as its size says: how many hold tokens, only these numbers tell.
    """

    key: Node
    value: Node
    past: Node | None
    slots: Node | None = None


def find_cache(block: Block, outputs: set[Node]) -> Cache | None:
    """The cache of a block; None when the graph neither returns nor reads one."""
    edited = {_as_read(n): n for n in outputs if _as_read(n) is not n}
    outputs = outputs | {n.args[0] for n in outputs if n.target in _CLEARED} | edited.keys()
    key, past = _trace(block.attention.key, outputs)
    value, _ = _trace(block.attention.value, outputs)
    if key is None or value is None:
        return _latent(block, outputs, edited)
    return Cache(edited.get(key, key), edited.get(value, value), past, key.args[2] if _is_put(key) else None)


def _is_put(node: Node) -> bool:
    """Whether a value is a buffer [B, H, N, D] that the caller gave, with new tokens put into its slots."""
    if node.target not in _PUTS or node.meta["val"].ndim != 4:
        return False
    return node.args[0].op == "placeholder" and node.args[1] % 4 == 2


def _as_read(node: Node) -> Node:
    """The keys or values that attention reads, of which an edit hands back a part."""
    if unturned(node).target in SHORTENED:
        node = unturned(node).args[0]
    return node.args[0] if is_left_out(node) else node


def is_left_out(node: Node) -> bool:
    """Whether a value is another without the tokens that a rule put in."""
    return node.target is _GATHER and node.args[1].target is torch.ops.tokred.original_places.default


def _latent(block: Block, outputs: set[Node], edited: dict[Node, Node]) -> Cache | None:
    todo, seen = [block.attention.key, block.attention.value], dict[Node, None]()
    while todo:
        node = todo.pop()
        if node in seen or node is block.input:
            continue
        seen[node] = None
        if _continued(node):
            return Cache(node, node, node.args[0][0])
        todo.extend(node.all_input_nodes)
    held = [node for node in seen if node in outputs and node.op != "placeholder" and _is_latent(node)]
    held = [edited.get(node, node) for node in held]
    return Cache(held[0], held[-1], None) if held else None


def _continued(node: Node) -> bool:
    """Whether a value is joined, token after token, to one that the caller gave."""
    if node.target is not aten.cat.default or not _is_latent(node):
        return False
    dim = node.args[1] if len(node.args) > 1 else 0
    return dim % 4 == 2 and node.args[0][0].op == "placeholder"


def _is_latent(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.ndim == 4 and value.dtype.is_floating_point


def unturned(node: Node) -> Node:
    """A value before keys in it were numbered by rank."""
    return node.args[0] if node.target is TURNED else node


def _trace(node: Node, outputs: set[Node]) -> tuple[Node | None, Node | None]:
    while node.target in (*VIEWS, TURNED) and node not in outputs:
        node = node.args[0]
    past = None
    if node.target is aten.cat.default:
        first = node.args[0][0]
        past = first if first.op == "placeholder" else None
    elif _is_put(node):
        past = node.args[0]
    return (node, past) if node in outputs or past is not None else (None, None)


def first_shortened(output: Node) -> Node | None:
    """A cache that an eviction shortened, among what a graph returns; None without one."""
    return next((node for node in output.all_input_nodes if unturned(node).target in SHORTENED), None)


def handed_back(block: Block, reach: Reach, outputs: Iterable[Node]) -> list[Node]:
    """The outputs that a later step makes a block's keys and values from.

    Beside whole keys and values, these are parts of them, as a sliding window keeps, and what they are computed from.
    """
    site = block.attention
    sources = [_source(site.key), _source(site.value)]
    found = []
    for handed in outputs:
        node = _as_read(handed)
        own = reach.above(block.input, node) and node is not block.input
        if not own or reach.above(site.node, node) or reach.above(site.query, node):
            continue
        below = any(reach.above(source, node) for source in sources)
        above = any(reach.above(node, value) for value in (site.key, site.value))
        if below or above:
            found.append(handed)
    return found


def key_heads(block: Block) -> int:
    """Heads of a block's keys, before they are repeated for the heads of the queries."""
    node = block.attention.key
    shape = node.meta["val"].shape
    heads = shape[1]
    while node.target in VIEWS:
        node = node.args[0]
        now = node.meta["val"].shape
        if len(now) == 4 and set(now[-2:]) == set(shape[-2:]):
            heads = min(heads, now[1])
    return heads


def unrepeated(node: Node, goal: Node) -> Node | None:
    """The goal [B, Hkv, T, D], when a value is it with each head repeated in place; None for any other way there."""
    while node is not goal:
        if node.target not in VIEWS or (node.target is aten.unsqueeze.default and node.args[1] % 5 != 2):
            return None
        node = node.args[0]
    return node if node.meta["val"].ndim == 4 else None


def _source(node: Node) -> Node:
    while node.target in (*VIEWS, TURNED):
        node = node.args[0]
    return node
