"""place: give tokens other positions, from which rotary tables are computed again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokcompile.passes.compact import place_compact
from tokcompile.passes.context import Context
from tokcompile.passes.members import place_slots
from tokcompile.passes.per_image import place_per_image
from tokcompile.passes.turned import rotary_sites
from tokcompile.passes.variable import place_variable
from tokcompile.steps import Place

METHODS: Mapping[str, Callable[..., None]] = {
    "variable": place_variable,
    "compact": place_compact,
    "per_image": place_per_image,
    "slots": place_slots,
}
"""By the name that `by:` has, what gives positions to the tokens that the frequencies of a stack turn."""


def place(ctx: Context, step: Place) -> None:
    """Compute the rotary tables of a stack from other positions; masks and the cache stay as they are."""
    found = rotary_sites(ctx, step.address.stack, step.at)
    record: dict[str, object] = {"verb": "place", "at": step.at, "by": step.by}
    ctx.log.append(record)
    METHODS[step.by](ctx, step, found, record)
    ctx.refresh()
