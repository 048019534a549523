"""Caches of what text attends to beside itself, as patches of images: later steps bring a mask for all of them.

The model makes that mask anew in every step, from what its caller gives, before any graph is compiled: it cannot be
told that an edit left fewer keys.
"""

from __future__ import annotations

from torch import SymInt
from torch.fx import Node

from tokcompile.axes import size_of
from tokcompile.axes.atoms import same
from tokcompile.errors import EditError
from tokcompile.program import Program, place
from tokcompile.sites import Sites

Lengths = dict[Node, "int | SymInt"]
"""By attention, how many keys it reads."""


def masked_lengths(program: Program, sites: Sites) -> Lengths:
    """The attentions that read another sequence, hand its keys back, and mask them as the caller says."""
    inputs, reach = program.inputs(), sites.reach
    found: Lengths = {}
    for block, cache in sites.caches.items():
        mask = block.attention.mask
        if mask is None or reach.above(block.input, cache.key) or not reach.any_above(mask, inputs):
            continue
        found[block.attention.node] = block.attention.key.meta["val"].shape[2]
    return found


def check_lengths(program: Program, sites: Sites, before: Lengths) -> None:
    """Refuse an edit after which fewer keys are handed back than the mask of a later step is for.

    Args:
        before: what `masked_lengths` said of the graph before the edit.

    Raises:
        EditError: it names the first attention to such keys.
    """
    for node, now in masked_lengths(program, sites).items():
        old = before.get(node, now)
        if not same(size_of(old), size_of(now)):
            raise EditError(
                "steps that go on from this cache would mask more keys than the edit leaves in it",
                where=[place(node)],
                found=f"{now} of {old} keys of another sequence, which the model masks as its caller says",
                remedy="call the model with use_cache=False",
            )
