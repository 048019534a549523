"""A graph that continues a sequence: what a rule that pruned the prompt means for each later step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.fx import Node

from tokcompile.binding import RuleInstance
from tokcompile.edit import Editor, sub
from tokcompile.errors import CaptureError
from tokcompile.program import Program
from tokcompile.sites import Sites
from tokcompile.steps import Drop

aten = torch.ops.aten


def adapt_decode(program: Program, sites: Sites, instance: RuleInstance, log: list[dict[str, Any]],
                 counts: Counter[str]) -> None:
    """Let a decode step continue after a pruned prompt.

    The cache that the graph is given is already short, and tokens are chosen once, in the prefill. What is left is the
    position of the new tokens. Under `positions: keep` it is what the caller says. Under `compact` it is smaller by the
    number of tokens dropped, which is what the padding mask is longer than the first block's keys.

    Raises:
        CaptureError: the new position cannot be known from the inputs.
    """
    drops = [s for s in instance.rule.steps if isinstance(s, Drop)]
    compact = any(s.positions == "compact" for s in drops)
    for rotary in sites.rotary.get("decoder", []):
        given = _given(program, sites, rotary.positions)
        if sites.padding is None:
            if given and compact or not given and not compact and any(_from_start(s) for s in drops):
                raise CaptureError(
                    f"rule '{instance.name}' dropped prompt tokens, and this decode step cannot know its position",
                    where=[f"{instance.rule.path}:{drops[0].line}"], found="no attention_mask among the inputs",
                    remedy="pass attention_mask (of the unpruned length), as model.generate does")
        elif compact and given:
            _shift(program, sites, rotary.positions, instance, counts)
            log.append({"verb": "decode", "positions": "compact"})


def _given(program: Program, sites: Sites, positions: Node) -> bool:
    """Whether the caller passes positions, or a mask that they are counted from."""
    return sites.reach.any_above(positions, [n for n in program.inputs() if n.meta["val"].ndim == 2
                                             and not n.meta["val"].dtype.is_floating_point])


def _from_start(step: Drop) -> bool:
    """Whether a drop shortens the first block's cache, which transformers counts positions by."""
    return step.at.startswith(("projector", "splice", "decoder.0.", "decoder.input", "embedding"))


def _shift(program: Program, sites: Sites, positions: Node, instance: RuleInstance,
           counts: Counter[str]) -> None:
    editor = Editor(program, instance.name, counts)
    users = list(positions.users)
    with editor.after([positions]):
        dropped = editor.arithmetic(sub, editor.size(sites.padding, 1), _key_count(editor, sites))
        moved = editor.call(aten.sub.Tensor, positions, dropped)
    for user in users:
        if user in sites.reach.order and any(sites.reach.above(user, t) for r in sites.rotary["decoder"]
                                             for t in r.tables):
            editor.swap_input(user, positions, moved)
    program.changed()


def _key_count(editor: Editor, sites: Sites) -> Any:
    """Keys of the first block in this step: those cached and the new ones."""
    block = sites.stacks["decoder"].blocks[0]
    past = sites.caches[block].past
    return editor.arithmetic(lambda a, b: a + b, editor.size(past, 2), editor.size(block.input, 1))
