"""evict: shorten the caches that a prompt leaves."""

from __future__ import annotations

import torch
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.carried import evicted_name, hand_on, padding_name
from tokcompile.edit import Length, length_value
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.keychoice import KeySelection
from tokcompile.passes.keymerge import BlockMerge, KeyMerge
from tokcompile.program import place
from tokcompile.sites.cache import handed_back
from tokcompile.steps import Evict

tokred = torch.ops.tokred


def evict(ctx: Context, step: Evict) -> None:
    """Let the graph hand back the chosen keys and values alone; the prompt itself attends to all of them."""
    selection: KeySelection = ctx.values[step.keep]
    blocks = ctx.sites.stacks["decoder"].blocks
    outputs = list(ctx.program.output.all_input_nodes)
    merged: KeyMerge | None = ctx.values.get(step.merged or "")
    held = {index: handed_back(blocks[index], ctx.sites.reach, outputs) for index in selection.blocks}
    for index, chosen in selection.blocks.items():
        if chosen.index is not None:
            _shorten(ctx, held[index], chosen.index, chosen.size, merged.blocks[index] if merged else None)
        if chosen.padding is not None:
            hand_on(ctx.program, padding_name(index), chosen.padding)
        if chosen.evicted is not None:
            hand_on(ctx.program, evicted_name(index), chosen.evicted)
    each = selection.blocks.values()
    record = {
        "verb": "evict",
        "at": step.at,
        "keep": step.keep,
        "from": _spelled(length_value(b.size) for b in each),
        "to": _spelled(length_value(b.count) for b in each),
    }
    if step.merged:
        record["merged"] = step.merged
    if selection.windowed:
        record["note"] = f"blocks {', '.join(map(str, selection.windowed))} keep what their window does"
    ctx.log.append(record)
    ctx.refresh()


def _spelled(lengths: object) -> str:
    return ", ".join(dict.fromkeys(map(str, lengths)))


def _shorten(ctx: Context, held: list[Node], index: Node, size: Length, merged: BlockMerge | None) -> None:
    output, tokens = ctx.program.output, size_of(length_value(size))
    if not held:
        raise EditError(
            "a block hands back no keys and values that could be shortened",
            where=[place(index)],
            remedy="load the model with a DynamicCache",
        )
    for node in held:
        shape = node.meta["val"].shape
        if len(shape) != 4 or not same(size_of(shape[2]), tokens):
            raise EditError(
                "the cache that this block hands back is not all of its keys and values",
                where=[place(node)],
                found=f"{tuple(shape)}, of {length_value(size)} tokens",
                remedy="load the model with a DynamicCache",
            )
        with ctx.editor.after([node, index, *(merged.sources if merged else [])]):
            short = (
                ctx.editor.call(tokred.gather_keys.default, node, index)
                if merged is None
                else merged.shortened(ctx.editor, node, index)
            )
        ctx.editor.swap_input(output, node, short)
