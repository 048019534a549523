"""The fields of a drop step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, Name, one_of
from tokcompile.steps.base import Step, single_part


class Drop(Step):
    """Removes the tokens that a selection did not choose, from an address on."""

    verb = "drop"
    refers = {"keep": "select"}
    makes = False

    at: AddressText
    """address from which the tokens are gone"""
    keep: Name
    """the selection that stays"""
    positions: one_of("keep", "compact") = "keep"
    """positions of the tokens that stay: keep their own, or compact them to 0, 1, 2…"""

    @model_validator(mode="after")
    def _check(self) -> Drop:
        single_part(self, ("input", "output"), "a drop")
        return self
