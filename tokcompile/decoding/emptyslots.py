"""Which slots of a cache hold tokens, in a graph that continues a prompt into which markers were put.

Their number differs from row to row and depends on the data, so that no input tells. The cache itself does: the
prompt's graph wrote a value that no token has into all slots that hold none, and into the caller's padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.editing.edit import Editor
from tokcompile.editing.hiding import Hiding
from tokcompile.errors import CaptureError
from tokcompile.program import Program, place
from tokcompile.sites import Block, Sites

aten = torch.ops.aten
tokred = torch.ops.tokred


def follow_slots(program: Program, sites: Sites, cuts: Sequence[int], first: int, editor: Editor) -> None:
    """Let every attention of a decode graph from a block on see the slots that hold tokens, and no others.

    Args:
        cuts: blocks whose caches an edit shortened, ascending: those between two hold the same tokens.
        first: the first block after a mark.

    Raises:
        CaptureError: a block has no cache that could tell.
    """
    blocks = sites.stacks["decoder"].blocks
    starts = [first, *(c for c in cuts if first < c < len(blocks))]
    for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True):
        here = [block for block in blocks[start:end] if block in sites.caches]
        if here:
            seen = _seen(editor, sites, here[0])
            Hiding(editor, sites.reach, seen, anew=True).apply([block.attention for block in here])
    program.changed()


def _seen(editor: Editor, sites: Sites, block: Block) -> Node:
    """bool [B, Tk]: the slots of a block's cache that hold tokens, and the new tokens."""
    past = sites.caches[block].past
    if past is None or past.meta["val"].ndim != 4:
        raise CaptureError(
            "markers were put into the prompt, and a block's cache does not say which of its slots hold tokens",
            where=[place(block.attention.node)],
            found="no cache [B, H, T, D] among the inputs",
            remedy="call the model with transformers' DynamicCache",
        )
    padding = sites.padding
    with editor.after([past, block.input, *([padding] if padding is not None else [])]):
        held = editor.call(tokred.held_slots.default, past)
        rows, new = editor.size(block.input, 0), editor.size(block.input, 1)
        ones = editor.call(aten.new_full.default, held, [rows, new], True)
        if padding is not None:
            count = editor.arithmetic(lambda n: -n, new)
            real = editor.call(aten.ne.Scalar, editor.call(aten.slice.Tensor, padding, 1, count, MAX), 0)
            editor.require(real, "padding among the new tokens of a prompt that goes on after markers")
        return editor.call(aten.cat.default, [held, ones], 1)
