"""What a rule file must obey beyond the form of each field: names, references and expressions fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokcompile.binding import KEEP
from tokcompile.errors import RuleError, TokredError, known
from tokcompile.expr import RESERVED_NAMES, has_expression, names_in
from tokcompile.params import FACTS
from tokcompile.steps import QUERIES, REFERENCES, Evict, Merge, Score, Select, Step

if TYPE_CHECKING:
    from tokcompile.rulefile import Rule

NOUN = {
    "tap": "tap",
    "score": "score",
    "select": "selection",
    "merge": "merge",
    "insert": "set of tokens",
    "layer": "layer",
}
_OPTION_KEYS = frozenset({"rule", "rules"})


def check_rule(rule: Rule) -> Iterator[str]:
    """Raise RuleError at the first thing that cannot work; yield what is odd, each with file and line."""
    _check_params(rule)
    _check_budget(rule)
    made = _check_names(rule)
    used: set[str] = set()
    for step in rule.steps:
        _check_expressions(step, rule)
        for field, kind, name in _references(step):
            _check_reference(step, field, kind, name, made, rule)
            used.add(name)
    _check_caches(rule, made)
    if all(step.makes for step in rule.steps):
        raise RuleError("no step changes the model", where=rule.place("steps"), remedy="end the rule with a drop step")
    yield from _unused(rule, made, used)


def _check_params(rule: Rule) -> None:
    for name, param in rule.params.items():
        place = rule.place("params", name)
        if name in _OPTION_KEYS | RESERVED_NAMES:
            raise RuleError(f"'{name}' cannot be the name of a parameter", where=place, remedy="choose another name")
        try:
            param.convert(param.default)
        except TokredError as error:
            cause = f"default of parameter '{name}': {error.cause}"
            place = rule.place("params", name, "default")
            raise RuleError(cause, where=place, found=error.found, remedy=error.remedy) from None


def _check_budget(rule: Rule) -> None:
    for name, text in rule.file.budget.items():
        place = rule.place("budget", name)
        if KEEP in rule.params:
            cause = f"'budget' says what '{KEEP}' sets, and there is a parameter of that name"
            raise RuleError(cause, where=place, remedy="remove one of them")
        if name not in rule.params:
            cause = f"'budget' sets '{name}', which is no parameter"
            raise RuleError(cause, where=place, remedy=known(name, rule.params))
        try:
            names = names_in(text)
        except TokredError as error:
            raise RuleError(f"'{name}' of 'budget': {error.cause}", where=place, remedy=error.remedy) from None
        if KEEP not in names:
            cause = f"'{name}' of 'budget' does not depend on '{KEEP}'"
            remedy = "an expression such as ${" + KEEP + " // 2}; for a value that stays, the parameter's default"
            raise RuleError(cause, where=place, found=text, remedy=remedy)
        try:
            rule.bind(**{KEEP: 1})
        except TokredError as error:
            raise RuleError(f"'{name}' of 'budget': {error.cause}", where=place, remedy=error.remedy) from None


def _check_names(rule: Rule) -> dict[str, Step]:
    made: dict[str, Step] = {}
    for step in rule.steps:
        if getattr(step, "name", None) is None:
            continue
        if step.name in made:
            where = [f"{rule.path}:{step.line}", f"{rule.path}:{made[step.name].line}"]
            raise RuleError(f"two steps are named '{step.name}'", where=where, remedy="rename one of them")
        made[step.name] = step
    return made


def _references(step: Step) -> Iterator[tuple[str, str, str]]:
    for field, kind in step.refers.items():
        value = getattr(step, field)
        for name in (value,) if isinstance(value, str) else value or ():
            yield field, kind, name
    if isinstance(step, Score) and step.to and step.to not in REFERENCES:
        yield "to", "tap", step.to
    if isinstance(step, Score) and step.voters:
        yield "queries", "insert", step.voters


def _check_reference(step: Step, field: str, kind: str, name: str, made: dict[str, Step], rule: Rule) -> None:
    here = f"{rule.path}:{step.line}"
    fitting = [other.name for other in made.values() if other.verb == kind and other.line <= step.line]
    if name not in made:
        cause = f"'{field}: {name}' of '{step.verb}' names no {NOUN[kind]}"
        words = {"to": REFERENCES, "queries": (*QUERIES, "last:N")}.get(field, ())
        raise RuleError(cause, where=here, remedy=known(name, [*fitting, *words]))
    maker = made[name]
    where = [here, f"{rule.path}:{maker.line}"]
    if maker.verb != kind:
        cause = f"'{name}' is a {NOUN[maker.verb]}, and '{field}' of '{step.verb}' takes a {NOUN[kind]}"
        raise RuleError(cause, where=where, remedy=known(name, fitting))
    if rule.steps.index(maker) >= rule.steps.index(step):
        raise RuleError(
            f"{NOUN[kind]} '{name}' is used before it is made", where=where, remedy="move the step that makes it up"
        )


def _check_caches(rule: Rule, made: dict[str, Step]) -> None:
    """Choices among keys of caches belong to evictions and merges of caches, and other choices do not."""
    own = ("sinks", "recent", "taper", "heads", "floor", "floor_by")
    chosen: dict[str, Score | None] = {}
    for step in rule.steps:
        where = f"{rule.path}:{step.line}"
        if isinstance(step, Score | Merge):
            for name in (step.scores,) if isinstance(step.scores, str) else step.scores or ():
                _check_scores(step, made[name], where)
        if isinstance(step, Select):
            scores = made.get(step.scores or "")
            of_caches = isinstance(scores, Score) and scores.of_caches
            chosen[step.name] = scores if of_caches else None
            wrong = [f for f in own if not of_caches and f in step.model_fields_set]
            if wrong:
                cause = f"'{wrong[0]}' belongs to choices among keys of caches"
                raise RuleError(cause, where=where, remedy="remove it, or score at: decoder.*.cache")
            if of_caches and (step.by not in ("topk", "pairwise") or "windows" in step.model_fields_set):
                cause = "keys of caches are chosen by: topk or pairwise, of each head's all"
                raise RuleError(cause, where=where, found=f"by: {step.by}", remedy="by: topk, without windows")
            if step.by == "pairwise" and not of_caches:
                cause = "'by: pairwise' chooses among keys of caches"
                raise RuleError(cause, where=where, remedy="score at: decoder.*.cache, or by: topk")
        elif isinstance(step, Evict) or (isinstance(step, Merge) and step.of_caches):
            _check_choice(step, chosen.get(step.keep), where)
            _check_merged(step, made, where)
        else:
            kept = getattr(step, "keep", None)
            if isinstance(kept, str) and chosen.get(kept) is not None:
                cause = f"'{kept}' is a choice among keys of caches, and '{step.verb}' takes tokens of a sequence"
                raise RuleError(cause, where=where, remedy="evict the caches, or score at a value that has tokens")


def _check_choice(step: Evict | Merge, scores: Score | None, where: str) -> None:
    """Refuse to shorten a cache by a choice that was not made there."""
    if scores is None:
        cause = f"'keep: {step.keep}' is no choice among keys of caches"
        raise RuleError(cause, where=where, remedy="score at the cache's address, and select by those scores")
    if scores.at != step.at:
        does = "evicted" if isinstance(step, Evict) else "merged"
        cause = f"keys of {scores.at} were scored, and those of {step.at} are {does}"
        raise RuleError(cause, where=where, remedy="the same address in both")


def _check_scores(step: Score | Merge, scores: Step, where: str) -> None:
    """Refuse scores of something else than the keys of a step's own caches."""
    if isinstance(scores, Score) and scores.at != step.at:
        cause = f"'{scores.name}' scores {scores.at or scores.of}, and '{step.verb}' takes scores of {step.at}"
        raise RuleError(cause, where=where, remedy="the same address in both")


def _check_merged(step: Evict | Merge, made: dict[str, Step], where: str) -> None:
    """Refuse a merge around another choice than the one that stays."""
    merged = made[step.merged] if isinstance(step, Evict) and step.merged else None
    if isinstance(merged, Merge) and (not merged.of_caches or merged.keep != step.keep):
        cause = f"'{merged.name}' merges around '{merged.keep}', and '{step.keep}' stays"
        raise RuleError(cause, where=where, remedy="the same selection in both, of keys of the same caches")


def _check_expressions(step: Step, rule: Rule) -> None:
    place = f"{rule.path}:{step.line}"
    for field, text in step.given().items():
        if not has_expression(text):
            continue
        try:
            names = names_in(text)
        except TokredError as error:
            raise RuleError(f"'{field}' of '{step.verb}': {error.cause}", where=place, remedy=error.remedy) from None
        for name in sorted(names - FACTS.keys() - rule.params.keys()):
            cause = f"unknown name '{name}' in '{field}: {text}' of '{step.verb}'"
            raise RuleError(cause, where=place, remedy=known(name, [*rule.params, *FACTS]))
        is_budget = field == step.budgeted
        for name in sorted(names & rule.params.keys()):
            if rule.params[name].type == "ratio_or_count" and not is_budget:
                cause = f"'{name}' is a ratio_or_count, and '{field}' of '{step.verb}' is no budget"
                raise RuleError(cause, where=place, remedy="use it in keep of a select, or declare it as int or float")


def _unused(rule: Rule, made: dict[str, Step], used: set[str]) -> Iterator[str]:
    for name, step in made.items():
        if name not in used and step.makes:
            yield f"{rule.path}:{step.line}: {NOUN[step.verb]} '{name}' is never used"
    texts = [text for step in rule.steps for text in step.given().values() if has_expression(text)]
    asked = set().union(*map(names_in, texts))
    for name in rule.params:
        if name not in asked:
            yield f"{rule.place('params', name)}: parameter '{name}' is never used"
