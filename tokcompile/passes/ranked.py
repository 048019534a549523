"""Blocks whose keys can be turned to other positions: what steps that number keys by rank ask of rotations."""

from __future__ import annotations

from collections.abc import Sequence

from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.passes.turned import in_parts
from tokcompile.program import place
from tokcompile.sites import Block
from tokcompile.sites.pairing import Pairing, find_pairings


def turnable(ctx: Context, at: str, blocks: Sequence[Block], several: bool = False) -> dict[int, Pairing]:
    """The pairings of some blocks of the decoder by number, of rotations that can be undone.

    Args:
        at: the address that names the blocks, for errors.
        several: whether tokens may have several positions, as those of an image in time, height and width.

    Raises:
        EditError: a block has none, or one whose angles are not those of whole positions.
    """
    every = find_pairings(ctx.program, ctx.sites, "decoder")
    found = {}
    for block in blocks:
        pairing = every.get(block.attention)
        why = "nothing turns its queries and keys" if pairing is None else _unfit(ctx, pairing, several)
        if why is not None:
            raise EditError(
                "keys of this attention cannot have their ranks as positions",
                where=[at, place(block.attention.node)],
                found=why,
                remedy="positions: keep",
            )
        found[ctx.sites.stacks["decoder"].blocks.index(block)] = pairing
    return found


def _unfit(ctx: Context, pairing: Pairing, several: bool) -> str | None:
    """Why keys cannot be turned back by their positions; None where they can."""
    frequencies = pairing.frequencies
    if frequencies.coordinates > 1 and not several:
        return "tokens have several positions each"
    if pairing.numbers != tuple(range(frequencies.pairs)):
        return "pairs that use the frequencies in another order, or not all of them"
    if ctx.sites.reach.any_above(frequencies.inverse, ctx.program.inputs()):
        return "frequencies that depend on what the model is given, as those do that follow its length"
    if in_parts(ctx, frequencies.angles):
        return "positions in parts of 1"
    return None
