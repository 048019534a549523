"""The fields of a mark step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, IntOrExpression, Name, one_of, wrong
from tokcompile.steps.base import Step, single_part


class Mark(Step):
    """Puts one marker in place of each run of tokens that a selection did not choose, from an address on.

    A run is a stretch of neighbouring image tokens that are not kept: it goes on across rows of an image's grid, and
    ends at a token of text. The marker stands at the run's last place and has its positions; no other token is
    renumbered.
    """

    verb = "mark"
    refers = {"keep": "select"}
    makes = False

    at: AddressText
    """address from which markers stand in place of runs: decoder.0.input"""
    keep: Name
    """the selection of image tokens that stay"""
    content: one_of("zero", "run_mean", "mean", "vector", "row") = "run_mean"
    """what a marker holds: zeros, the mean of its run, the mean of all image tokens of its row, a learned vector (a
    parameter that begins as zeros), or a row of the table of embeddings"""
    row: IntOrExpression = -1
    """token whose embedding a marker is (content: row); -1 for none"""
    min_run: IntOrExpression = 1
    """tokens of the shortest run that is replaced; those of shorter ones stay"""
    spans: IntOrExpression = 0
    """stretches of image tokens between text, at most, in a row of the batch; 0 for one an image"""

    @model_validator(mode="after")
    def _check(self) -> Mark:
        single_part(self, ("input", "output"), "a mark")
        if self.address.stack != "decoder":
            raise wrong(f"'{self.at}' is not a place for a mark", "a place of the decoder: decoder.0.input")
        for field, least in (("min_run", 1), ("row", -1), ("spans", 0)):
            value = getattr(self, field)
            if isinstance(value, int) and value < least:
                raise wrong(f"'{field}: {value}' is too small", f"{least} or more")
        if not any(has_expression(v) for v in (self.content, self.row)):
            if self.content == "row" and self.row < 0:
                raise wrong("'content: row' needs 'row'", "row: the number of a token, whose embedding is the marker")
            if self.content != "row" and self.row >= 0:
                raise wrong(f"'content: {self.content}' does not use 'row'", "remove it, or write content: row")
        return self
