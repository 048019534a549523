"""Types of the fields of a rule file: each validates a value or lets a `${…}` stand until the rule is applied."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from tokcompile.address import BLOCK_PARTS, STACKS, WHOLE, parse_address
from tokcompile.budget import Budget
from tokcompile.errors import TokredError, known
from tokcompile.expr import has_expression

EXPRESSION = {"type": "string", "pattern": r"\$\{[^{}]*\}"}
NAME_PATTERN = r"^[a-z][a-z0-9_]*$"


def wrong(cause: str, remedy: str) -> PydanticCustomError:
    """Return a validation error that carries a remedy for the user."""
    return PydanticCustomError("rule", "{cause}", {"cause": cause, "remedy": remedy})


def checked(check: Callable[[Any], Any], value: Any) -> Any:
    """Run a check that raises TokredError inside a validation."""
    try:
        return check(value)
    except TokredError as error:
        raise wrong(error.cause, error.remedy) from None


def one_of(*names: str, numbered: str | None = None, named: bool = False) -> Any:
    """Return the type of a word out of a list.

    Args:
        numbered: a further form with a number: `last` allows `last:8`.
        named: whether the name of a step is allowed too.
    """
    form = re.compile(rf"{numbered}:[1-9][0-9]{{0,5}}") if numbered else None

    def check(value: object) -> object:
        if has_expression(value) or (isinstance(value, str) and (value in names or (form and form.fullmatch(value)))):
            return value
        if named and isinstance(value, str) and re.fullmatch(NAME_PATTERN, value):
            return value
        allowed = [*names, *([f"{numbered}:N"] if numbered else [])]
        raise wrong(f"{value!r} is not one of its values", known(str(value), allowed))

    schema: list[dict[str, Any]] = [{"enum": list(names)}, EXPRESSION]
    if numbered:
        schema.append({"type": "string", "pattern": rf"^{numbered}:[1-9][0-9]*$"})
    if named:
        schema.append({"type": "string", "pattern": NAME_PATTERN})
    return Annotated[str, BeforeValidator(check), WithJsonSchema({"anyOf": schema})]


def _name(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(NAME_PATTERN, value):
        return value
    raise wrong(f"{value!r} is not a name", "small letters, digits and _, a letter first")


def _integer(value: object) -> object:
    if has_expression(value) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise wrong(f"{value!r} is not a whole number", "a whole number or an expression")


def _number(value: object) -> object:
    if isinstance(value, Fraction):  # what an expression gives
        return float(value)
    if has_expression(value) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise wrong(f"{value!r} is not a number", "a number or an expression")


def _share(value: object) -> object:
    if has_expression(value):
        return value
    if not isinstance(value, bool) and isinstance(value, int | float | Fraction) and 0 <= value <= 1:
        return value if isinstance(value, int | Fraction) else Fraction(str(value))
    raise wrong(f"{value!r} is no share", "a number from 0 to 1, or an expression")


def _places(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(map(_is_count, value)) and list(value) == sorted(value):
        return tuple(value)
    raise wrong(f"{value!r} is no list of places", "whole numbers from 0 on, ascending: [0, 4, 4]")


def _counts(value: object) -> object:
    if isinstance(value, list | tuple) and value and all(_is_count(number) for number in value):
        return tuple(value)
    if has_expression(value) or _is_count(value):
        return value
    raise wrong(f"{value!r} is no count", "a whole number from 0 on, a list of them, or an expression")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _shares(value: object) -> object:
    """Positive fractions up to 1: one number, a text such as "1/4" or "1/4, 1", or a list of these."""
    if has_expression(value):
        return value
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else (value,)
    try:
        found = tuple(_fraction(part) for part in parts)
    except (TypeError, ValueError, ZeroDivisionError):
        found = ()
    if not found or not all(0 <= share <= 1 for share in found):
        raise wrong(f"{value!r} is no fraction from 0 to 1", 'a number, a fraction such as "1/4", or a list: "1/4, 1"')
    return found


def _fraction(value: object) -> Fraction:
    if isinstance(value, bool):
        raise TypeError
    return Fraction(value.strip()) if isinstance(value, str) else Fraction(str(value))


def _order(value: object) -> object:
    if has_expression(value) or (value in (1, 2, "inf") and not isinstance(value, bool | float)):
        return value
    raise wrong(f"a norm of order {value!r} is not offered", "1, 2 or inf")


def _address(value: object) -> object:
    if not isinstance(value, str):
        raise wrong(f"{value!r} is not an address", "for example decoder.2.input")
    checked(parse_address, value)
    return value


def _budget(value: object) -> object:
    if not has_expression(value):
        checked(Budget.parse, value)
    return value


def _offsets(value: object) -> object:
    if isinstance(value, str) and value in OFFSETS:
        return value
    if isinstance(value, list | tuple) and value and all(_is_pair(pair) for pair in value):
        return tuple(tuple(pair) for pair in value)
    raise wrong(f"{value!r} is not a set of offsets", f"{' or '.join(OFFSETS)}, or pairs of rows and columns: [[0, 1]]")


def _is_pair(value: object) -> bool:
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    return is_pair and all(isinstance(number, int) and not isinstance(number, bool) for number in value)


def _exact(value: object) -> object:
    # Pydantic would take "1" for 1 and 1 for True; a rule file says what it means.
    if isinstance(value, bool) or has_expression(value):
        return value
    raise wrong(f"{value!r} is not true or false", "true or false")


OFFSETS = ("cross", "square")

_PLACES = [f"{stack}.{part}" for stack, parts in WHOLE.items() for part in parts]
_BLOCK = rf"^({'|'.join(STACKS)})\.(-?[0-9]+|features|\*|\$\{{[^{{}}]*\}})\.({'|'.join(BLOCK_PARTS)})$"
_PAIR = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}

Name = Annotated[str, BeforeValidator(_name), WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
IntOrExpression = Annotated[
    int | str, BeforeValidator(_integer), WithJsonSchema({"anyOf": [{"type": "integer"}, EXPRESSION]})
]
Number = Annotated[
    int | float | str, BeforeValidator(_number), WithJsonSchema({"anyOf": [{"type": "number"}, EXPRESSION]})
]
_COUNT = {"type": "integer", "minimum": 0}
CountList = Annotated[
    int | str | tuple[int, ...],
    BeforeValidator(_counts),
    WithJsonSchema({"anyOf": [_COUNT, {"type": "array", "items": _COUNT, "minItems": 1}, EXPRESSION]}),
]
Share = Annotated[
    Any,
    BeforeValidator(_share),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, EXPRESSION]}),
]
PlaceList = Annotated[
    tuple[int, ...], BeforeValidator(_places), WithJsonSchema({"type": "array", "items": _COUNT, "minItems": 1})
]
_SHARE = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string"}]}
Shares = Annotated[
    Any,
    BeforeValidator(_shares),
    WithJsonSchema({"anyOf": [*_SHARE["anyOf"], {"type": "array", "items": _SHARE, "minItems": 1}]}),
]
NormOrder = Annotated[
    int | str, BeforeValidator(_order), WithJsonSchema({"anyOf": [{"enum": [1, 2, "inf"]}, EXPRESSION]})
]
AddressText = Annotated[
    str,
    BeforeValidator(_address),
    WithJsonSchema({"anyOf": [{"enum": _PLACES}, {"type": "string", "pattern": _BLOCK}]}),
]
BudgetText = Annotated[
    int | float | str,
    BeforeValidator(_budget),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^[0-9. ]+(/[0-9 ]+|%)?$"},
                EXPRESSION,
            ]
        }
    ),
]
Offsets = Annotated[
    str | tuple[tuple[int, int], ...],
    BeforeValidator(_offsets),
    WithJsonSchema({"anyOf": [{"enum": list(OFFSETS)}, {"type": "array", "items": _PAIR, "minItems": 1}]}),
]
Truth = Annotated[bool | str, BeforeValidator(_exact), WithJsonSchema({"anyOf": [{"type": "boolean"}, EXPRESSION]})]
