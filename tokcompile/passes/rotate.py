"""rotate: replace how positions turn queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokcompile.passes.context import Context
from tokcompile.passes.digits import rotate_digits
from tokcompile.passes.frequencies import rotate_base
from tokcompile.passes.phases import rotate_content
from tokcompile.passes.turned import rotary_sites
from tokcompile.steps import Rotate

METHODS: Mapping[str, Callable[..., None]] = {
    "base": rotate_base,
    "content": rotate_content,
    "digits": rotate_digits,
}
"""By the name that `by:` has, what takes the place of the rotation of a stack."""


def rotate(ctx: Context, step: Rotate) -> None:
    """Replace the rotation of a stack's queries and keys."""
    found = rotary_sites(ctx, step.address.stack, step.at)
    record: dict[str, object] = {"verb": "rotate", "at": step.at, "by": step.by}
    ctx.log.append(record)
    METHODS[step.by](ctx, step, found, record)
    ctx.refresh()
