"""layer: bring a learned layer of a rule's own into the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokcompile.passes.attention_layer import add_attention
from tokcompile.passes.context import Context
from tokcompile.passes.gated_layer import gate
from tokcompile.steps import Layer

METHODS: Mapping[str, Callable[[Context, Layer, dict[str, object]], None]] = {"attention": add_attention, "gated": gate}
"""By the name that `by:` has, what puts the layer in and completes the step's record."""


def layer(ctx: Context, step: Layer) -> None:
    """Put a step's layer in; one of no blocks, or that keeps the model's own, leaves the graph as it is.

    A graph that continues a prompt has no projector, unless the text has further images.
    """
    if step.by == "gated" and ctx.sites.phase == "decode" and ctx.sites.projector is None:
        return
    record: dict[str, object] = {"verb": "layer", "at": step.at, "by": step.by, "name": step.name}
    ctx.log.append(record)
    METHODS[step.by](ctx, step, record)
