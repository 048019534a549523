"""The fields of a place step."""

from __future__ import annotations

from fractions import Fraction

from pydantic import model_validator

from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, IntOrExpression, Name, Shares, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses


class Place(Step):
    """Gives tokens other positions: what a stack's rotary tables are computed from."""

    verb = "place"
    refers = {"of": "merge"}
    makes = False

    by: str
    """variable, compact, per_image, slots, or the name of a plug-in"""
    at: AddressText = "decoder.rotary"
    """address of a stack's rotary tables: decoder.rotary"""
    delta: Shares = (Fraction(1),)
    """what an image's tokens advance by, where a token of text advances by 1: "1/4", or a list with one for each image
    of a row, of which the last stands for all that follow (variable)"""
    denominator: IntOrExpression = 256
    """common denominator of positions; positions are exact as long as they stay below 2^24 of its parts (variable)"""
    of: Name | None = None
    """the merge whose tokens get the positions of what they are made of (slots)"""
    slots: IntOrExpression = 8
    """positions of each merged token; divides the frequencies of each coordinate (slots)"""

    @model_validator(mode="after")
    def _check(self) -> Place:
        known_by(self, self.by)
        refuses(
            self, {"delta": ("variable",), "denominator": ("variable",), "of": ("slots",), "slots": ("slots",)}, self.by
        )
        needs(self, {"slots": ("of",)}.get(self.by, ()), self.by)
        if self.address.part != "rotary" or self.address.index is not None:
            raise wrong(f"'{self.at}' is not a place for positions", "the rotary tables of a stack: decoder.rotary")
        for name in ("denominator", "slots"):
            value = getattr(self, name)
            if not has_expression(value) and value < 1:
                raise wrong(f"'{name}: {value}' is below 1", "a whole number from 1 on")
        self._check_shares()
        return self

    def _check_shares(self) -> None:
        if has_expression(self.delta) or has_expression(self.denominator):
            return
        for share in self.delta:
            if self.denominator % share.denominator:
                raise wrong(
                    f"'delta: {share}' is no multiple of 1/{self.denominator}, and positions are counted in these",
                    f"a fraction such as 1/4, or 'denominator: {share.denominator}'",
                )
