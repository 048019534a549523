"""Names that a rule may use in `by:`, built in or brought by another package. Looking names up runs no code.

A package brings a way to score or to select through the entry-point group `tokcompile.passes`, under the name
`score.NAME` or `select.NAME`; an operator of its own through the group `tokcompile.ops`.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points

PASSES = "tokcompile.passes"
OPS = "tokcompile.ops"
BUILT_IN = {
    "score": ("attention_received", "norm", "cosine", "random", "recency", "joined"),
    "select": ("topk", "neighbours", "fill", "diverse", "protect", "pooled", "pairwise"),
    "merge": ("pairs", "pool", "nearest", "kmeans", "transport", "clips", "density_peaks", "super_tokens", "likeness"),
    "layer": ("attention", "gated"),
    "place": ("variable", "compact", "per_image", "slots"),
    "route": ("votes", "frequencies"),
    "rotate": ("base", "content", "digits"),
}

_registered: dict[str, set[str]] = {}


def register_name(verb: str, name: str) -> None:
    """Let rules say `by: name` for a verb (`score`, `select` or `merge`) without installing an entry point."""
    _registered.setdefault(verb, set()).add(name)


def names(verb: str) -> set[str]:
    """Return every name that `by:` may take for a verb."""
    return {*BUILT_IN.get(verb, ()), *_registered.get(verb, ()), *_installed(verb)}


@cache
def _installed(verb: str) -> frozenset[str]:
    prefix = f"{verb}."
    points = entry_points(group=PASSES)
    return frozenset(point.name.removeprefix(prefix) for point in points if point.name.startswith(prefix))
