"""Rule files: their schema, the loader, and what a user's options mean. Loading a rule file never runs code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, create_model
from pydantic_core import ErrorDetails

from tokcompile import yamlfile
from tokcompile.binding import KEEP, ResolvedRule, RuleInstance, bind
from tokcompile.errors import RuleError, known
from tokcompile.fields import NAME_PATTERN, Name, wrong
from tokcompile.params import Param
from tokcompile.rulechecks import check_rule
from tokcompile.steps import PLANNED, STEPS, Model, Step

__all__ = ["ResolvedRule", "Rule", "RuleInstance", "json_schema", "load_rule", "parse_rules", "rule_names"]

LIBRARY = Path(__file__).parent / "rules"
MOMENTS = ("prefill",)
LATER_MOMENTS = ("decode", "every n", "conversation")


def _moment(value: object) -> object:
    if value in MOMENTS:
        return value
    later = value in LATER_MOMENTS or (isinstance(value, str) and value.startswith("every "))
    cause = f"'when: {value}' is not available in this version" if later else f"{value!r} is not a moment to decide"
    raise wrong(cause, f"available: {', '.join(MOMENTS)}")


class Paper(Model):
    """Where a method comes from."""

    title: str
    """title of the paper"""
    arxiv: str | None = None
    """arXiv number, in quotes: "2403.06764" """
    url: str | None = None
    """address of the paper"""


def _one_verb(schema: dict[str, Any]) -> None:
    for verb, entry in schema["properties"].items():
        schema["properties"][verb] = next(choice for choice in entry["anyOf"] if "$ref" in choice)
    schema |= {"minProperties": 1, "maxProperties": 1}


class _Entry(Model, json_schema_extra=_one_verb):
    """One step: one verb and its fields."""

    def step(self) -> Step:
        """Return the one step of the entry."""
        return next(step for verb in STEPS if (step := getattr(self, verb)) is not None)


StepEntry = create_model(
    "StepEntry", __base__=_Entry, __doc__=_Entry.__doc__, **{verb: (step | None, None) for verb, step in STEPS.items()}
)


class RuleFile(Model):
    """A rule file of tokcompile: named parameters and an ordered list of steps."""

    rule: Name
    """name of the rule"""
    about: str
    """what the rule does, in a sentence"""
    paper: Paper | None = None
    """where the method comes from"""
    when: Annotated[str, BeforeValidator(_moment), WithJsonSchema({"enum": list(MOMENTS)})] = "prefill"
    """when the rule decides: prefill"""
    params: dict[Name, Param] = Field(default={}, json_schema_extra={"propertyNames": {"pattern": NAME_PATTERN}})
    """what a user may set"""
    budget: dict[Name, str] = Field(default={}, json_schema_extra={"propertyNames": {"pattern": NAME_PATTERN}})
    """what the option keep: N sets, where the rule has no such parameter: expressions on keep, a count, and on facts"""
    steps: tuple[StepEntry, ...] = Field(min_length=1)
    """what is done, in order"""


@dataclass(frozen=True)
class Rule:
    """A rule as loaded, before a user's options.

    Attributes:
        file: the content of the rule file.
        steps: its steps, each with its line.
        path: file name as messages show it.
        source: text of the file.
        warnings: what is odd but no error, each with file and line.
    """

    file: RuleFile
    steps: tuple[Step, ...]
    path: str
    source: str = field(repr=False)
    lines: yamlfile.Lines = field(repr=False, compare=False)
    warnings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the rule."""
        return self.file.rule

    @property
    def params(self) -> dict[str, Param]:
        """Declared parameters by name."""
        return self.file.params

    @property
    def takes_keep(self) -> bool:
        """Whether `keep`, the number of image tokens that stay, is an option: a parameter or by the rule's `budget`."""
        return KEEP in self.params or bool(self.file.budget)

    def bind(self, /, **options: object) -> RuleInstance:
        """Return the rule with these values for its parameters, and defaults for the others."""
        return bind(self, options)

    def place(self, *keys: str | int) -> str:
        """Return file and line of a place of the file, for messages."""
        return f"{self.path}:{self.lines.nearest(keys)}"

    def as_data(self) -> dict[str, Any]:
        """Return the content as plain data: what a rule file holds, without defaults that it does not state."""
        return self.file.model_dump(mode="json", exclude_unset=True)


def rule_names() -> list[str]:
    """Return the names of the rules of the library."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def load_rule(source: str | Path) -> Rule:
    """Load and check a rule.

    Args:
        source: name of a library rule, or path of a `.yaml` or `.yml` file.

    Raises:
        RuleError: names file and line, what was found and what is allowed.
    """
    text = str(source)
    if isinstance(source, Path) or text.endswith((".yaml", ".yml")) or os.sep in text:
        return parse_rule(yamlfile.read_text(Path(source)), text)
    if text not in rule_names():
        raise RuleError(f"there is no rule '{text}'", remedy=f"{known(text, rule_names())}; or a path to a .yaml file")
    path = LIBRARY / f"{text}.yaml"
    return parse_rule(yamlfile.read_text(path), str(path.relative_to(LIBRARY.parent.parent)))


def parse_rule(source: str, path: str) -> Rule:
    """Read a rule from the text of a rule file; path is what messages call it."""
    data, lines = yamlfile.parse(source, path)
    if not isinstance(data, dict):
        cause, remedy = "a rule file is a mapping of keys", f"known: {', '.join(RuleFile.model_fields)}"
        raise RuleError(cause, where=f"{path}:1", found=repr(data)[:80], remedy=remedy)
    _check_verbs(data.get("steps"), lines, path)
    try:
        file = RuleFile.model_validate(data)
    except ValidationError as error:
        raise _explain(error, lines, path) from None
    steps = tuple(entry.step() for entry in file.steps)
    for position, step in enumerate(steps):
        step._line = lines.nearest(("steps", position, step.verb))
    rule = Rule(file, steps, path, source, lines)
    return Rule(file, steps, path, source, lines, tuple(check_rule(rule)))


def parse_rules(options: Mapping[str, object], reserved: Iterable[str] = ()) -> list[RuleInstance]:
    """Read what a user writes in `torch.compile(..., options=…)`.

    Args:
        options: `{"rule": name or path, **parameters}`, or `{"rules": [name, {"rule": …, **parameters}, …]}`.
        reserved: keys that are not for rules; they are ignored here.
    """
    own = {key: value for key, value in options.items() if key not in set(reserved)}
    if ("rule" in own) == ("rules" in own):
        raise RuleError(
            "the options name no rule" if "rule" not in own else "the options hold both 'rule' and 'rules'",
            found=", ".join(map(str, own)) or "no options",
            remedy=f'{{"rule": NAME, **parameters}} or {{"rules": [NAME, …]}}; rules: {", ".join(rule_names())}',
        )
    if "rule" in own:
        return [_instance(own)]
    for key in own.keys() - {"rules"}:
        remedy = f'put it into its rule: {{"rule": NAME, "{key}": …}}'
        raise RuleError(f"option '{key}' beside 'rules' belongs to no rule", remedy=remedy)
    entries = own["rules"]
    if isinstance(entries, str | Path | Mapping | Rule | RuleInstance):
        entries = [entries]
    if not isinstance(entries, Iterable) or not (entries := list(entries)):
        raise RuleError("'rules' is not a list of rules", found=repr(own["rules"]), remedy='[NAME, {"rule": NAME}]')
    return [_instance(entry if isinstance(entry, Mapping) else {"rule": entry}) for entry in entries]


def _instance(entry: Mapping[str, object]) -> RuleInstance:
    options = {str(key): value for key, value in entry.items() if key != "rule"}
    source = entry.get("rule")
    if isinstance(source, RuleInstance):
        return source if not options else bind(source.rule, {**source.params, **options})
    if isinstance(source, str | Path):
        source = load_rule(source)
    if not isinstance(source, Rule):
        raise RuleError("an entry of 'rules' names no rule", found=repr(dict(entry)), remedy=known("", rule_names()))
    return source.bind(**options)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a rule file, for editors."""
    schema = RuleFile.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "tokcompile rule file"
    return schema


def _check_verbs(steps: object, lines: yamlfile.Lines, path: str) -> None:
    for position, entry in enumerate(steps if isinstance(steps, list) else []):
        place = f"{path}:{lines.nearest(('steps', position))}"
        if not isinstance(entry, dict) or len(entry) != 1:
            found = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
            raise RuleError("a step has exactly one verb", where=place, found=found, remedy="- select: {…}")
        verb = next(iter(entry))
        if verb in PLANNED:
            remedy = f"available: {', '.join(STEPS)}"
            raise RuleError(f"verb '{verb}' is not available in this version", where=place, remedy=remedy)
        if verb not in STEPS:
            raise RuleError(f"there is no verb '{verb}'", where=place, remedy=known(verb, STEPS))
        if not isinstance(entry[verb], dict):
            remedy = f"known: {', '.join(STEPS[verb].model_fields)}"
            raise RuleError(f"'{verb}' needs its fields", where=place, found=repr(entry[verb]), remedy=remedy)


def _model_at(location: tuple[str | int, ...]) -> tuple[type[Model], str]:
    """Return the model that a place of a file belongs to, and what to call it."""
    if location[:1] == ("steps",) and len(location) > 2:
        return STEPS[location[2]], f"'{location[2]}'"
    if location[:1] == ("params",) and len(location) > 1:
        return Param, f"parameter '{location[1]}'"
    if location[:1] == ("budget",) and len(location) > 1:
        return RuleFile, f"'{location[1]}' of 'budget'"
    return (Paper, "'paper'") if location[:1] == ("paper",) else (RuleFile, "the rule file")


def _explain(error: ValidationError, lines: yamlfile.Lines, path: str) -> RuleError:
    """Turn the first failed check, in the order of the file, into an error for the user."""
    # A misspelt key is also a missing one, and a rule's only step, if it is wrong, also no step; what is wrong is what
    # the user wants to hear about.
    follows = ("missing", "too_short")
    details = min(
        error.errors(include_url=False), key=lambda each: (each["type"] in follows, lines.nearest(each["loc"]))
    )
    return _explain_one(details, f"{path}:{lines.nearest(details['loc'])}")


def _explain_one(details: ErrorDetails, place: str) -> RuleError:
    location, context = details["loc"], details.get("ctx", {})
    key = str(location[-1]) if location else ""
    model, owner = _model_at(location)
    if details["type"] == "extra_forbidden":
        return RuleError(f"unknown key '{key}' in {owner}", where=place, remedy=known(key, model.model_fields))
    described = model.model_fields[key].description if key in model.model_fields else ""
    if details["type"] == "missing":
        return RuleError(f"'{key}' is missing in {owner}", where=place, remedy=f"add {key}: {described}")
    subject = f"'{key}' of {owner}" if key in model.model_fields else owner
    cause = f"{subject}: {context.get('cause', details['msg'])}"
    found = "" if "cause" in context else repr(details["input"])
    return RuleError(cause, where=place, found=found, remedy=context.get("remedy", described or ""))
