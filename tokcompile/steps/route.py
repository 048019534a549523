"""The fields of a route step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, IntOrExpression, Number, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses


class Route(Step):
    """Lets each step after a prompt attend to few of the cached keys, chosen anew; the cache stays whole."""

    verb = "route"
    makes = False

    by: str
    """votes or frequencies"""
    at: AddressText = "decoder.*.attention"
    """attention of the blocks: decoder.*.attention, or one block's: decoder.3.attention"""
    keep: IntOrExpression
    """how many keys a token attends to, those of sinks and recent among them; all where there are no more"""
    sinks: IntOrExpression = 0
    """how many of each row's first real tokens are attended to in any case"""
    recent: IntOrExpression = 1
    """how many of each row's last real tokens are attended to in any case; tokens of the step itself always are"""
    smooth: IntOrExpression = 1
    """neighbouring keys of whose votes the largest counts, an odd number (votes)"""
    positions: one_of("rank", "keep") = "keep"
    """rank: keys are scored as if they stood at one distance, and those chosen have positions 0, 1, 2...; keep: keys
    are scored and read as they are (votes)"""
    reuse: Number = 2
    """cosine of a step's queries to those of the last choice from which that choice serves again; above 1: never
    (votes)"""
    pairs: IntOrExpression | None = None
    """how many of the pairs that a rotation turns score a key (frequencies)"""
    per: one_of("kv_head", "query_head") = "kv_head"
    """which heads choose keys of their own: those of the cache, or those of the queries (frequencies)"""

    @model_validator(mode="after")
    def _check(self) -> Route:
        known_by(self, self.by)
        votes, frequencies = ("votes",), ("frequencies",)
        users = dict.fromkeys(("smooth", "positions", "reuse"), votes) | dict.fromkeys(("pairs", "per"), frequencies)
        refuses(self, users, self.by)
        needs(self, {"frequencies": ("pairs",)}.get(self.by, ()), self.by)
        if self.address.stack != "decoder" or self.address.part != "attention":
            raise wrong(f"'{self.at}' is not a place for a route", "attention of the decoder: decoder.*.attention")
        for field, least in (("keep", 1), ("sinks", 0), ("recent", 0), ("smooth", 1), ("pairs", 1)):
            value = getattr(self, field)
            if value is not None and not has_expression(value) and value < least:
                raise wrong(f"'{field}: {value}' is too small", f"{least} or more")
        if isinstance(self.smooth, int) and self.smooth % 2 == 0:
            raise wrong(f"'smooth: {self.smooth}' has no middle", "an odd number")
        self._check_ends()
        return self

    def _check_ends(self) -> None:
        ends = (self.keep, self.sinks, self.recent)
        if any(has_expression(value) for value in ends):
            return
        if self.sinks + max(self.recent, 1) > self.keep:
            found = f"{self.sinks} sinks and {max(self.recent, 1)} recent tokens in 'keep: {self.keep}'"
            raise wrong(f"there is no room for {found}", "a larger keep, or fewer sinks and recent tokens")
