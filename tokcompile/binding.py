"""A rule with its options (RuleInstance), and the same once the facts of a model are known (ResolvedRule)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tokcompile import yamlfile
from tokcompile.budget import Budget, clamp, round_ratio
from tokcompile.errors import RuleError, TokredError, known
from tokcompile.expr import has_expression, names_in, substitute
from tokcompile.params import FACTS, ParamValue, plain
from tokcompile.steps import Step

if TYPE_CHECKING:
    from tokcompile.rulefile import Rule


KEEP = "keep"
"""The option that says how many image tokens stay: a parameter of a rule, or what its `budget` is written in."""


@dataclass(frozen=True, eq=False)
class RuleInstance:
    """A rule and the values of its parameters. Equal, and of one hash, when rule and values are equal.

    Attributes:
        rule: the rule.
        params: value of every parameter, in its exact form; a text with a `${…}` waits for the facts of a model.
    """

    rule: Rule
    params: Mapping[str, ParamValue]

    @property
    def name(self) -> str:
        """Name of the rule."""
        return self.rule.name

    def resolve(self, facts: Mapping[str, int]) -> ResolvedRule:
        """Apply the facts of a model: every `${…}` gets its value, except in a budget.

        Args:
            facts: what `params.FACTS` names, as far as this model has it.
        """
        resolved = self._resolved_params(facts)
        names = {**facts, **{name: value for name, value in resolved.items() if not isinstance(value, Budget)}}
        steps = tuple(_resolve_step(step, names, self.rule) for step in self.rule.steps)
        return ResolvedRule(self, steps, resolved, dict(facts))

    def resolve_only(self, steps: Sequence[Step], facts: Mapping[str, int]) -> list[Step]:
        """Apply the facts of a graph that lacks some of a model's, as a later step's does, to the steps given."""
        values = {}
        for name, value in self.params.items():
            if has_expression(value) and names_in(value) <= facts.keys():
                value = self.rule.params[name].resolve(value, dict(facts))
            if not has_expression(value) and not isinstance(value, Budget):
                values[name] = value
        return [_resolve_step(step, {**facts, **values}, self.rule) for step in steps]

    def budget(self, step: Step, n: Any, facts: Mapping[str, int]) -> Any:
        """Return how many of n tokens a step keeps or makes.

        A ratio_or_count parameter in an expression stands for its count among n. An expression gives a count.

        Args:
            n: size of the group that the budget counts in; may be symbolic where it is one budget or one name.
        """
        return self.resolve(facts).budget(step, n)

    def as_yaml(self) -> str:
        """Return a rule file whose defaults are this instance's values; loading that gives an equal instance."""
        data = self.rule.as_data()
        for name, value in self.params.items():
            data["params"][name]["default"] = plain(value)
        return yamlfile.dump(data)

    @cached_property
    def _digest(self) -> str:
        return hashlib.sha256(self.as_yaml().encode()).hexdigest()

    def fingerprint(self) -> str:
        """Return the SHA-256 of the rule and its values: the key of a compile cache."""
        return self._digest

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleInstance) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={plain(value)}" for name, value in self.params.items())
        return f"RuleInstance({self.name}, {values})"

    def _resolved_params(self, facts: Mapping[str, int]) -> dict[str, ParamValue]:
        resolved = {}
        for name, value in self.params.items():
            place = self.rule.place("params", name)
            _needs_facts(names_in(value) if has_expression(value) else set(), facts, f"parameter '{name}'", place)
            try:
                resolved[name] = self.rule.params[name].resolve(value, dict(facts))
            except TokredError as error:
                cause = f"parameter '{name}' = {value} on this model: {error.cause}"
                raise RuleError(cause, where=place, found=error.found, remedy=error.remedy) from None
        return resolved


@dataclass(frozen=True)
class ResolvedRule:
    """A rule ready to be applied to one model.

    Attributes:
        instance: where it comes from.
        steps: steps whose `${…}` have their values; only a budget may still hold one: ask `budget`.
        params: value of every parameter.
        facts: the facts of the model that were used.
    """

    instance: RuleInstance
    steps: tuple[Step, ...]
    params: Mapping[str, ParamValue]
    facts: Mapping[str, int] = field(repr=False)

    @property
    def name(self) -> str:
        """Name of the rule."""
        return self.instance.name

    def place(self, step: Step) -> str:
        """Return file and line of a step, for messages."""
        return f"{self.instance.rule.path}:{step.line}"

    def budget(self, step: Step, n: Any) -> Any:
        """Return how many of n tokens a step keeps or makes; see RuleInstance.budget."""
        text, allow_zero = getattr(step, step.budgeted), getattr(step, "allow_zero", False)
        if not has_expression(text):
            return Budget.parse(text).count(n, step.round, allow_zero)
        lone = self.params.get(text.strip()[2:-1].strip())
        if isinstance(lone, Budget):
            return lone.count(n, self._rounding(step, text), allow_zero)
        if not isinstance(n, int):
            raise RuleError(
                f"'{text}' needs a known number of tokens, and this one is symbolic",
                where=self.place(step),
                found=str(n),
                remedy="use one parameter alone as the budget, or compile with a static length",
            )
        return clamp(self._count(step, text, n), n, allow_zero)

    def is_share(self, step: Step) -> bool:
        """Whether a step's budget is a share of the tokens, and neither a count nor all of them."""
        text = getattr(step, step.budgeted)
        budget = self.params.get(text.strip()[2:-1].strip()) if has_expression(text) else Budget.parse(text)
        return isinstance(budget, Budget) and budget.is_ratio and budget.value != 1

    def _rounding(self, step: Step, text: str) -> str:
        own = self.instance.rule.params.get(text.strip()[2:-1].strip())
        return (own.round if own else None) or step.round

    def _count(self, step: Step, text: str, n: int) -> int:
        declared = self.instance.rule.params
        counts = {
            name: value.count(n, declared[name].round or step.round)
            for name, value in self.params.items()
            if isinstance(value, Budget)
        }
        _needs_facts(names_in(text) & FACTS.keys(), self.facts, f"{step.budgeted}: {text}", self.place(step))
        try:
            value = Fraction(substitute(text, {**self.facts, **self.params, **counts}))
        except TokredError as error:
            raise error.inside(self.place(step)) from None
        is_share = 0 < value < 1 and not names_in(text) & counts.keys()
        if value < 0 or is_share:
            raise RuleError(
                f"the budget '{text}' of {n} tokens is {value}, which is not a count",
                where=self.place(step),
                remedy="an expression gives a count; for a share, use a ratio_or_count parameter" if is_share else "",
            )
        return round_ratio(value.numerator, value.denominator, step.round)


def bind(rule: Rule, options: Mapping[str, object]) -> RuleInstance:
    """Check options against a rule's parameters and return the rule with all its values."""
    options = _without_keep(rule, options)
    for option in options:
        if option not in rule.params:
            cause = f"rule '{rule.name}' has no option '{option}'"
            raise RuleError(cause, where=rule.place("params"), remedy=known(option, rule.params))
    params = {}
    for name, param in rule.params.items():
        try:
            params[name] = param.convert(options.get(name, param.default))
        except TokredError as error:
            cause = f"option '{name}' of rule '{rule.name}': {error.cause}"
            remedy = f"{error.remedy} ({param.about})"
            raise RuleError(cause, where=rule.place("params", name), found=error.found, remedy=remedy) from None
    return RuleInstance(rule, params)


def _without_keep(rule: Rule, options: Mapping[str, object]) -> Mapping[str, object]:
    """Options of which `keep` became the parameters that the rule's `budget` sets by it."""
    sets = rule.file.budget
    if not sets or KEEP not in options:
        return options
    both = [name for name in options if name in sets]
    place = rule.place("budget")
    if both:
        raise RuleError(
            f"option '{KEEP}' of rule '{rule.name}' sets '{both[0]}', which is given, too",
            where=place,
            remedy=f"give either '{KEEP}' or {', '.join(map(repr, sets))}",
        )
    try:
        value = Budget.parse(options[KEEP]).value
    except TokredError as error:
        cause = f"option '{KEEP}' of rule '{rule.name}': {error.cause}"
        raise RuleError(cause, where=place, found=error.found, remedy=error.remedy) from None
    if isinstance(value, int):
        count = f"min({value}, image.tokens)"
    else:
        count = f"max(image.tokens * {value.numerator} // {value.denominator}, 1)"
    rest = {name: given for name, given in options.items() if name != KEEP}
    return {**rest, **{name: re.sub(rf"\b{KEEP}\b", f"({count})", text) for name, text in sets.items()}}


def _needs_facts(names: set[str], facts: Mapping[str, int], user: str, place: str) -> None:
    for name in sorted(names - facts.keys()):
        raise RuleError(
            f"{user} needs '{name}' ({FACTS[name]}), which this model does not have",
            where=place,
            found=", ".join(f"{fact} = {value}" for fact, value in facts.items()) or "no facts",
            remedy="give the parameter a number, or use a rule for this kind of model",
        )


def _resolve_step(step: Step, names: Mapping[str, Any], rule: Rule) -> Step:
    given = step.given()
    late = {step.budgeted}
    holes = {key: text for key, text in given.items() if key not in late and has_expression(text)}
    if not holes:
        return step
    place = f"{rule.path}:{step.line}"
    for key, text in holes.items():
        _needs_facts(names_in(text) & FACTS.keys(), names, f"'{key}: {text}'", place)
        try:
            value = substitute(text, names)
        except TokredError as error:
            raise error.inside(place) from None
        given[key] = int(value) if isinstance(value, Fraction) and value.denominator == 1 else value
    try:
        resolved = type(step).model_validate(given)
    except ValidationError as error:
        detail = error.errors()[0]
        context = detail.get("ctx", {})
        found = ", ".join(f"{key}: {text} is {given[key]}" for key, text in holes.items())
        cause = context.get("cause", detail["msg"])
        raise RuleError(cause, where=place, found=found, remedy=context.get("remedy", "")) from None
    resolved._line = step.line
    return resolved
