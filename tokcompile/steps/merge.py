"""The fields of a merge step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, CountList, IntOrExpression, Name, Number, Truth, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses, single_part


class Merge(Step):
    """Makes fewer tokens of those of a sequence: each new one is a combination of old ones."""

    verb = "merge"
    refers = {"keep": "select", "like": "tap"}
    makes = False

    by: str
    """pairs, pool, nearest, clusters, or the name of a plug-in"""
    at: AddressText
    """address from which the new tokens stand in place of the old ones; vision.*.middle means every block"""
    count: CountList | None = None
    """pairs that are merged in each block, a number or a list with one for each block (pairs); tokens that others are
    merged to (nearest); clusters (clusters)"""
    inflect: Number = 0
    """how the count changes with depth: -1 from twice as many to none, 0 alike, 1 from none to twice as many (pairs)"""
    metric: one_of("k", "q", "v", "input") = "k"
    """what likeness is measured by: keys, queries or values of the block, mean over heads, or the tokens (pairs)"""
    proportional: Truth = True
    """whether later attention counts a merged token as many: the log of its size is added to its scores (pairs)"""
    protect: one_of("leading", "none") = "leading"
    """leading: class and register tokens are not merged (pairs)"""
    rows: IntOrExpression | None = None
    """rows of the grid that is left, at most those that there are (pool)"""
    columns: IntOrExpression | None = None
    """columns of that grid, as many as rows by default (pool)"""
    keep: Name | None = None
    """selection of tokens that stay as they are, in front of the merged ones (nearest)"""
    like: Name | None = None
    """tap of what tokens are compared by, keys as their mean over heads (nearest)"""
    content: one_of("average", "sum") = "average"
    """average: mean of a token and those merged to it; sum: that token plus the mean of the others (nearest)"""
    lead: Truth = False
    """whether class tokens that the model leaves out of its features come first (nearest)"""
    iterations: IntOrExpression = 10
    """steps of k-means (clusters)"""
    seed: IntOrExpression = 0
    """seed of the tokens that clusters begin with (clusters)"""
    normalise: Truth = True
    """whether tokens are scaled to length one before the mean of a cluster is taken (clusters)"""
    positions: one_of("keep", "compact") = "keep"
    """positions of the new tokens: keep those of the tokens that they stand for, or compact them to 0, 1, 2…"""
    restore: Truth = False
    """whether outputs of the model get their old length back, each token the value of the one that holds it"""

    @model_validator(mode="after")
    def _check(self) -> Merge:
        known_by(self, self.by)
        pairs, nearest, clusters = ("pairs",), ("nearest",), ("clusters",)
        users = dict.fromkeys(("inflect", "metric", "proportional", "protect"), pairs)
        users |= {"count": ("pairs", "nearest", "clusters")} | dict.fromkeys(("rows", "columns"), ("pool",))
        users |= dict.fromkeys(("keep", "like", "content", "lead"), nearest)
        refuses(self, users | dict.fromkeys(("iterations", "seed", "normalise"), clusters), self.by)
        required = {
            "pairs": ("count",),
            "pool": ("rows",),
            "nearest": ("keep", "like", "count"),
            "clusters": ("count",),
        }
        needs(self, required.get(self.by, ()), self.by)
        if self.by == "pairs":
            if self.address.part not in ("middle", "input", "output"):
                raise wrong(
                    f"'{self.at}' is not a place for by: pairs", "vision.*.middle, or one block: vision.3.middle"
                )
            return self
        single_part(self, ("input", "output", "middle"), f"by: {self.by}")
        for field in ("count", "rows", "columns", "iterations"):
            self._check_number(field)
        return self

    def _check_number(self, field: str) -> None:
        """Refuse a number below 1, and a list of numbers; pairs alone know what to do with these."""
        value = getattr(self, field)
        if isinstance(value, tuple) or (isinstance(value, int) and value < 1):
            raise wrong(f"'{field}: {value}' of by: {self.by} is not a number from 1 on", "a whole number, at least 1")
