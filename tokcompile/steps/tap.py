"""The fields of a tap step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, Name, one_of
from tokcompile.steps.base import Step, single_part


class Tap(Step):
    """Makes a value of the model available to later steps under a name."""

    verb = "tap"

    name: Name
    """name under which later steps use the value"""
    at: AddressText
    """address of the value, or of the attention site that it belongs to"""
    what: one_of("q", "k", "v", "output", "input") = "output"
    """which value of an attention site: q, k, v, output or input"""

    @model_validator(mode="after")
    def _check(self) -> Tap:
        if self.what in ("q", "k", "v"):
            single_part(self, ("attention",), f"what: {self.what}")
        else:
            single_part(self, ("attention", "input", "output"), "a tap")
        return self
