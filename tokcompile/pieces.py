"""Models that reach the backend as several graphs: which rules are for a piece, and what the others are told."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule

from tokcompile.address import parse_address
from tokcompile.binding import RuleInstance
from tokcompile.sites import Sites

MAX_REMEMBERED = 64


@dataclass
class Pieces:
    """The graphs of one compiled model so far.

    Attributes:
        breaks: why and where it came apart, one line each.
    """

    breaks: list[str] = field(default_factory=list)

    def note(self, gm: GraphModule) -> None:
        """Remember why a graph ended before the model did."""
        reason: Any = getattr(gm, "compile_subgraph_reason", None)
        if reason is None or not getattr(reason, "graph_break", False):
            return
        lines = list(getattr(reason, "user_stack", ()) or ())
        where = f"{lines[-1].filename}, line {lines[-1].lineno}, in {lines[-1].name}" if lines else "unknown line"
        self.breaks.append(f"{str(reason.reason).strip().splitlines()[0]} ({where})")

    @property
    def split(self) -> bool:
        """Whether the model came in more than one graph."""
        return bool(self.breaks)

    def explain(self) -> str:
        """One sentence for an error or a warning."""
        first = self.breaks[0]
        more = f", and at {len(self.breaks) - 1} more places" if len(self.breaks) > 1 else ""
        return f"this graph is one piece of a model that came apart: {first}{more}"


_seen: dict[int, tuple[Any, Pieces]] = {}


def pieces_of(options: Any) -> Pieces:
    """What was seen of the model that is compiled with these very options."""
    known = _seen.get(id(options))
    if known is None or known[0] is not options:
        if len(_seen) >= MAX_REMEMBERED:
            _seen.pop(next(iter(_seen)))
        known = _seen[id(options)] = (options, Pieces())
    return known[1]


def rules_here(rules: Sequence[RuleInstance], sites: Sites, pieces: Pieces) -> list[RuleInstance]:
    """The rules that find any of their sites in this piece; all of them when the model is whole.

    A piece that has none of a rule's sites stays as it is, and a warning says so. One that has some of them and lacks
    others is left to the rule, whose error names what is missing.
    """
    if not pieces.split:
        return list(rules)
    here = [rule for rule in rules if _places(rule) & _present(sites)]
    absent = sorted({rule.name for rule in rules if rule not in here})
    if absent:
        held = ", ".join(sorted(_present(sites))) or "no attention"
        warnings.warn(f"{' and '.join(absent)}: nothing to do in a graph with {held}; {pieces.explain()}", stacklevel=3)
    return here


def _places(rule: RuleInstance) -> set[str]:
    texts = [step.at for step in rule.rule.steps if getattr(step, "at", None)]
    return {parse_address(text).stack for text in texts}


def _present(sites: Sites) -> set[str]:
    found = set(sites.stacks)
    found |= {"projector"} if sites.projector is not None else set()
    return found | ({"splice"} if sites.splice is not None else set())
