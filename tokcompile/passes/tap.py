"""tap: make a value of the model available to later steps under a name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tokcompile.passes.context import Context
from tokcompile.sites import resolve_address
from tokcompile.steps import Tap

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Tapped:
    """A tapped value and the stack it belongs to."""

    node: Node
    owner: str


def tap(ctx: Context, step: Tap) -> None:
    """Name a value: what an address means, or a part of an attention site, heads and tokens first: [B, H, T, D]."""
    place = resolve_address(ctx.sites, step.at)
    node = place.node
    if place.attention is not None and step.what != "output":
        site = place.attention
        node = {"q": site.query, "k": site.key, "v": site.value}.get(step.what, site.query)
        if step.what == "k" and site.key_transposed:
            with ctx.editor.before(site.node):
                node = ctx.editor.call(aten.transpose.int, node, -2, -1)
    ctx.values[step.name] = Tapped(node, place.owner)
    ctx.log.append({"verb": "tap", "name": step.name, "at": step.at})
