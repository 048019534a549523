"""Work that a rule does for nothing: it costs more than it saves, keeps everything, or scores the same twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.fx.node import map_arg

from tokcompile.binding import RuleInstance
from tokcompile.errors import TokredError
from tokcompile.flops import Counter
from tokcompile.program import Program
from tokcompile.report import Part, explain_captured

COUNTED = (
    "FLOPs of matrix products, convolutions and attention, by torch's counter, at the example's sizes; sorting, "
    "gathering and what lies outside of the graph count as none"
)


@dataclass(frozen=True)
class Waste:
    """One finding on a rule.

    Attributes:
        kind: `costs_more`, `keeps_everything`, `same_score`, or `refused` where the rule cannot be applied at all.
        text: what was found.
        formula: what was compared.
        source: where the figures are from.
    """

    kind: str
    text: str
    formula: str
    source: str = "the captured graph"


@dataclass(frozen=True)
class Balance:
    """What one graph costs before and after rules.

    Attributes:
        cost: FLOPs of what the rules inserted.
        saved: FLOPs that the rest of the graph does no more.
        findings: what is wasted; nothing where all is well.
    """

    cost: int
    saved: int
    findings: tuple[Waste, ...]


def balance(program: Program, rules: Sequence[RuleInstance]) -> Balance:
    """Apply rules to a program, in place, and hold their cost against what they save."""
    try:
        (part,) = explain_captured([program], rules)
    except TokredError as error:
        return Balance(0, 0, (Waste("refused", str(error), "the rule applies to the model"),))
    if part.after is None:
        return Balance(0, 0, (Waste("refused", part.refused, "the rule applies to the model"),))
    cost = part.after.totals["rule"]
    saved = part.before.flops - (part.after.flops - cost)
    found = [*_kept(part), *_scored(program)]
    if saved <= cost:
        text = f"scores, choices and moved tokens cost {cost} FLOPs, and {saved} are saved"
        found.insert(0, Waste("costs_more", text, "FLOPs inserted >= FLOPs saved"))
    return Balance(cost, saved, tuple(found))


def _kept(part: Part) -> list[Waste]:
    """Selections that choose all there is, and edits that leave as many tokens as they found."""
    found = []
    for record in (step for applied in part.applied for step in applied.steps):
        if "of" in record and record["of"] == record.get("count"):
            text = f"select '{record['name']}' chooses {record['count']} of {record['of']} tokens"
            found.append(Waste("keeps_everything", text, "tokens chosen = tokens up for choice"))
        if "from" in record and record["from"] == record.get("to"):
            text = f"{record['verb']} at {record.get('at', '?')} leaves {record['to']} of {record['from']} tokens"
            found.append(Waste("keeps_everything", text, "tokens after = tokens before"))
    return found


def _scored(program: Program) -> list[Waste]:
    """Scores, and what else costs FLOPs, that rules compute twice: the same operator on the same values."""
    numbers: dict[Any, int] = {}
    number: dict[Node, int] = {}
    first: dict[int, Node] = {}
    counter, found = Counter(), []
    for node in program.graph.nodes:
        number[node] = numbers.setdefault(_key(node, number), len(numbers))
        earlier = first.setdefault(number[node], node)
        if earlier is node:
            continue
        if "scores" in node.meta and "scores" in earlier.meta:
            text = f"scores '{node.meta['scores']}' are the scores '{earlier.meta['scores']}' once more"
            found.append(Waste("same_score", text, "same operator on the same values"))
        elif counter.cost(node).flops:
            text = f"'{node.name}' computes what '{earlier.name}' does: {node.target}"
            found.append(Waste("same_score", text, "same operator on the same values"))
    return found


def _key(node: Node, number: dict[Node, int]) -> Any:
    if node.op != "call_function" or not _inserted(node):
        return node
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: ("node", number[n]))
    return node.target, repr(args), repr(kwargs)


def _inserted(node: Node) -> bool:
    return "tokred" in (node.meta.get("custom") or {})
