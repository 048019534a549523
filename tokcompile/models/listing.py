"""Every model that `zoo:NAME` means, in a line each: the zoo of models that are run, then the catalogue of families."""

from __future__ import annotations

from dataclasses import dataclass

from tokcompile.models import catalogue, zoo


@dataclass(frozen=True)
class Line:
    """A model: its name, the stacks it has, where its class is from, and what is special about it."""

    name: str
    kind: str
    source: str
    about: str


def lines() -> list[Line]:
    """All models, in the order of their files."""
    found = [Line(name, entry.kind, "transformers", entry.about) for name, entry in zoo.ZOO.items()]
    return found + [Line(f.name, f.kind, f.source, f.about) for f in catalogue.families().values()]
