"""Errors that tell a user what failed, where, what was there instead, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class TokredError(Exception):
    """Base of every error that tokcompile raises on purpose.

    Args:
        cause: one sentence that says what failed.
        where: places, outermost first: rule file and line, address, graph node, line of the model's source.
        found: what was there instead.
        remedy: what to do about it.
    """

    def __init__(self, cause: str, *, where: Iterable[str] | str = (), found: str = "", remedy: str = "") -> None:
        self.cause = cause
        self.where = [where] if isinstance(where, str) else list(where)
        self.found = found
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.cause]
        lines += [f"  at: {place}" for place in self.where if place]
        if self.found:
            lines.append(f"  found: {self.found}")
        if self.remedy:
            lines.append(f"  try: {self.remedy}")
        return "\n".join(lines)

    def inside(self, place: str) -> TokredError:
        """Return the same error with an outer place put before the others."""
        return type(self)(self.cause, where=[place, *self.where], found=self.found, remedy=self.remedy)


class RuleError(TokredError):
    """A rule file or the options given for it are wrong."""


class AddressError(TokredError):
    """An address of a rule matches nothing in this model."""


class CaptureError(TokredError):
    """A model could not be brought to one graph in the dialect that passes understand."""


class EditError(TokredError):
    """An edit cannot be done soundly on this graph."""


class LowerError(TokredError):
    """A rewritten graph cannot be given to the chosen target."""


def known(name: str, names: Iterable[str], listing: str = "") -> str:
    """Say which names exist, the nearest first, for the remedy of an error.

    Args:
        listing: what lists the names, to be said instead where they are many.
    """
    names = sorted(names)
    near = get_close_matches(name, names, n=1)
    listed = listing or "known: " + (", ".join(names) if names else "none")
    return f"did you mean '{near[0]}'? {listed}" if near else listed
