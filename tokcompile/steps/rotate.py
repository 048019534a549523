"""The fields of a rotate step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, IntOrExpression, Number, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses


class Rotate(Step):
    """Replaces how positions turn queries and keys."""

    verb = "rotate"
    makes = False

    by: str
    """base, content, digits, or the name of a plug-in"""
    at: AddressText = "decoder.rotary"
    """address of a stack's rotary tables: decoder.rotary"""
    base: Number = 10000
    """base of the frequencies: that of base^(-2i/d); for content, of the rotation that it starts as (base, content)"""
    scaling: one_of("none", "linear", "ntk", "yarn") = "none"
    """how frequencies are stretched for longer texts (base)"""
    factor: Number = 1
    """by how much longer (base)"""
    trained: IntOrExpression | None = None
    """the length that the model was trained at, which yarn needs (base)"""
    first: IntOrExpression = 0
    """power of the first frequency: 0, whose pair counts tokens, or 1 (content)"""
    how: one_of("mul", "add", "scalar") = "mul"
    """mul: queries and keys times what a position says; add: plus it; scalar: products of what two positions say are
    added to scores (digits)"""
    length: IntOrExpression | None = None
    """how many positions the tables hold (digits)"""

    @model_validator(mode="after")
    def _check(self) -> Rotate:
        known_by(self, self.by)
        users = dict.fromkeys(("scaling", "factor", "trained"), ("base",)) | {"base": ("base", "content")}
        users |= {"first": ("content",), "how": ("digits",), "length": ("digits",)}
        refuses(self, users, self.by)
        needs(self, {"digits": ("length",)}.get(self.by, ()), self.by)
        if self.address.part != "rotary" or self.address.index is not None:
            raise wrong(f"'{self.at}' is not a place for a rotation", "the rotary tables of a stack: decoder.rotary")
        self._check_numbers()
        if self.scaling == "yarn" and self.trained is None:
            raise wrong("'scaling: yarn' needs 'trained'", "add trained: the length that the model was trained at")
        return self

    def _check_numbers(self) -> None:
        lowest = {"base": 1, "factor": 1, "trained": 1, "length": 1, "first": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is None or has_expression(value):
                continue
            if value < least or (name == "base" and value == 1) or (name == "first" and value > 1):
                raise wrong(
                    f"'{name}: {value}' is out of range", f"{name} from {least} on" if name != "first" else "0 or 1"
                )
