"""The fields of a merge step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, CountList, Number, Truth, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses, single_part


class Merge(Step):
    """Makes fewer tokens of those of a sequence: each new one is a combination of old ones."""

    verb = "merge"
    makes = False

    by: str
    """pairs, or the name of a plug-in"""
    at: AddressText
    """address from which the new tokens stand in place of the old ones; vision.*.middle means every block"""
    count: CountList | None = None
    """pairs that are merged in each block: a number, or a list with one for each block (pairs)"""
    inflect: Number = 0
    """how the count changes with depth: -1 from twice as many to none, 0 alike, 1 from none to twice as many (pairs)"""
    metric: one_of("k", "q", "v", "input") = "k"
    """what likeness is measured by: keys, queries or values of the block, mean over heads, or the tokens (pairs)"""
    proportional: Truth = True
    """whether later attention counts a merged token as many: the log of its size is added to its scores (pairs)"""
    protect: one_of("leading", "none") = "leading"
    """leading: class and register tokens are not merged (pairs)"""
    positions: one_of("keep", "compact") = "keep"
    """positions of the new tokens: keep those of the tokens that they stand for, or compact them to 0, 1, 2…"""
    restore: Truth = False
    """whether outputs of the model get their old length back, each token the value of the one that holds it"""

    @model_validator(mode="after")
    def _check(self) -> Merge:
        known_by(self, self.by)
        pairs = ("pairs",)
        refuses(self, dict.fromkeys(("count", "inflect", "metric", "proportional", "protect"), pairs), self.by)
        needs(self, {"pairs": ("count",)}.get(self.by, ()), self.by)
        if self.by == "pairs":
            if self.address.part not in ("middle", "input", "output"):
                raise wrong(
                    f"'{self.at}' is not a place for by: pairs", "vision.*.middle, or one block: vision.3.middle"
                )
        else:
            single_part(self, ("input", "output", "middle"), f"by: {self.by}")
        return self
