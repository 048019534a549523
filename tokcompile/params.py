"""Parameters of a rule: their declaration in a rule file, and the values that they may take."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from pydantic import model_validator

from tokcompile.budget import ROUNDINGS, Budget
from tokcompile.errors import RuleError, known
from tokcompile.expr import Value, evaluate, has_expression, names_in, substitute
from tokcompile.fields import one_of, wrong
from tokcompile.steps import Model

ParamValue = Value | Budget
Scalar = bool | int | float | str

TYPES = ("int", "float", "ratio_or_count", "bool", "choice", "str")
NUMERIC = ("int", "float", "ratio_or_count")

FACTS = {
    "vision.depth": "blocks of the vision tower",
    "vision.used": "blocks of the vision tower whose output the model uses",
    "vision.class_tokens": "class and register tokens of the vision tower",
    "decoder.depth": "blocks of the decoder",
    "encoder.depth": "blocks of the encoder",
    "image.tokens": "tokens of one image",
    "grid.width": "tokens in a row of the patch grid",
    "grid.height": "tokens in a column of the patch grid",
}
"""What an expression may ask about the model that a rule is applied to."""


class Param(Model):
    """One parameter of a rule."""

    type: one_of(*TYPES)
    """int, float, ratio_or_count (192, 0.5, "1/3"), bool, choice or str"""
    default: Scalar
    """value where the user gives none; may be an expression on facts of the model: ${vision.depth // 2}"""
    about: str
    """what it does, in a few words"""
    min: int | float | None = None
    """smallest value (int, float)"""
    max: int | float | None = None
    """largest value (int, float)"""
    choices: tuple[Scalar, ...] = ()
    """the values of a choice"""
    round: one_of(*ROUNDINGS) | None = None
    """how a ratio_or_count becomes a count of tokens, where the step's own rounding should not decide"""
    paper: Scalar | None = None
    """the paper's value"""

    @model_validator(mode="after")
    def _check(self) -> Param:
        if (self.type == "choice") != bool(self.choices):
            raise wrong("'choices' goes with type: choice", "give both, or neither")
        if self.type not in ("int", "float") and (self.min is not None or self.max is not None):
            raise wrong(f"'min' and 'max' do not apply to type: {self.type}", "remove them; they go with int and float")
        if self.round and self.type != "ratio_or_count":
            raise wrong("'round' goes with type: ratio_or_count", "remove it")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise wrong(f"min {self.min} is above max {self.max}", "swap them")
        return self

    def convert(self, value: object) -> ParamValue:
        """Check a value and give it its exact form; a text with a `${…}` on facts stays as it is.

        Raises:
            RuleError: wrong type, out of range, not one of the choices, or an expression that cannot stand here.
        """
        if has_expression(value):
            self._check_expression(value)
            return value
        exact = getattr(self, f"_as_{self.type}")(value)
        if self.min is not None and exact < Fraction(str(self.min)):
            raise RuleError(f"{value!r} is below its minimum {self.min}", remedy=self._range())
        if self.max is not None and exact > Fraction(str(self.max)):
            raise RuleError(f"{value!r} is above its maximum {self.max}", remedy=self._range())
        return exact

    def resolve(self, value: ParamValue, facts: dict[str, int]) -> ParamValue:
        """Compute a value that is an expression on facts of the model; return any other as it is."""
        if not has_expression(value):
            return value
        number = substitute(value, facts)
        if self.type == "int" and isinstance(number, Fraction) and number.denominator == 1:
            number = int(number)
        return self.convert(number)

    def _check_expression(self, text: str) -> None:
        if self.type not in NUMERIC:
            raise RuleError(f"an expression cannot stand for type: {self.type}", found=text, remedy="write the value")
        for name in names_in(text) - FACTS.keys():
            raise RuleError(f"'{name}' in '{text}' is not a fact of a model", remedy=known(name, FACTS))
        if "${" in text.strip()[1:]:
            raise RuleError(f"'{text}' is more than one expression", remedy="one ${…} that is the whole value")
        if not names_in(text):
            evaluate(text.strip()[2:-1], {})

    def _range(self) -> str:
        bounds = [
            f"at least {self.min}" if self.min is not None else "",
            f"at most {self.max}" if self.max is not None else "",
        ]
        return " and ".join(bound for bound in bounds if bound)

    def _as_int(self, value: Any) -> int:
        if not isinstance(value, bool | str) and hasattr(value, "__index__"):
            return int(value.__index__())
        raise RuleError(f"{value!r} is not a whole number", remedy=self._range() or "a whole number")

    def _as_float(self, value: Any) -> Fraction:
        if isinstance(value, Fraction):
            return value
        if isinstance(value, float) and math.isfinite(value):
            return Fraction(str(float(value)))
        if not isinstance(value, bool | str) and hasattr(value, "__index__"):
            return Fraction(int(value.__index__()))
        raise RuleError(f"{value!r} is not a number", remedy=self._range() or "a number")

    def _as_ratio_or_count(self, value: Any) -> Budget:
        return value if isinstance(value, Budget) else Budget.parse(value)

    def _as_bool(self, value: Any) -> bool:
        if isinstance(value, bool):
            return value
        raise RuleError(f"{value!r} is not true or false", remedy="true or false")

    def _as_choice(self, value: Any) -> Scalar:
        for choice in self.choices:
            if type(choice) is type(value) and choice == value:
                return choice
        raise RuleError(f"{value!r} is not one of the choices", remedy=known(str(value), map(str, self.choices)))

    def _as_str(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        raise RuleError(f"{value!r} is not a text", remedy="put it in quotes")


def plain(value: ParamValue) -> Scalar:
    """Return a parameter's value as a rule file would write it."""
    if isinstance(value, Budget):
        return str(value) if value.is_ratio else value.value
    if isinstance(value, Fraction):
        return float(value)
    return value
