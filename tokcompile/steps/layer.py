"""The fields of a layer step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, IntOrExpression, Name, Number, Truth, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses


class Layer(Step):
    """Brings a learned layer of its own into the model."""

    verb = "layer"
    refers = {"of": "insert"}
    makes = False

    by: str
    """attention, gated, or the name of a plug-in"""
    name: Name
    """name of the layer; its parameters are RULE.NAME_PART, or RULE.NAME_BLOCK_PART where blocks have one each"""
    at: AddressText
    """decoder.*.middle, where each block's attention was added (attention), or projector.input (gated)"""
    of: Name | None = None
    """the inserted tokens that attend to each other (attention)"""
    blocks: IntOrExpression | None = None
    """how many blocks have the layer, from the first that holds these tokens on: all by default, 0 for no layer
    (attention)"""
    mlp: one_of("keep", "gated") = "gated"
    """what features go through: the model's own projector (keep: no layer), or the gated one (gated)"""
    width: IntOrExpression | None = None
    """hidden width: that of the projector's output by default (gated)"""
    bias: Truth = False
    """whether its linear maps have biases (gated)"""
    norm: one_of("layer", "rms", "none") = "layer"
    """the learned norm in front of it"""
    std: Number = 0.02
    """standard deviation of its weights at the start; those of an attention's output are zeros"""

    @model_validator(mode="after")
    def _check(self) -> Layer:
        known_by(self, self.by)
        users = {"of": ("attention",), "blocks": ("attention",)}
        users |= dict.fromkeys(("mlp", "width", "bias"), ("gated",))
        refuses(self, users, self.by)
        needs(self, {"attention": ("of",)}.get(self.by, ()), self.by)
        if self.by == "attention" and (self.address.part != "middle" or self.address.index is None):
            raise wrong(
                f"'{self.at}' is not a place for an attention", "where that of a block was added: decoder.*.middle"
            )
        if self.by == "gated" and self.at != "projector.input":
            raise wrong(f"'{self.at}' is not a place for a projector", "projector.input")
        self._check_numbers()
        return self

    def _check_numbers(self) -> None:
        for field, least in (("blocks", 0), ("width", 1), ("std", 0)):
            value = getattr(self, field)
            if value is not None and not has_expression(value) and value < least:
                raise wrong(f"'{field}: {value}' is too small", f"{least} or more")
