"""The fields of a score step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, IntOrExpression, Name, NormOrder, Truth, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses, single_part

REFERENCES = ("cls", "mean", "last_text")
"""What `to:` of a score may name besides a tap."""


class Score(Step):
    """Gives each token of a sequence a number."""

    verb = "score"
    refers = {"of": "tap"}

    name: Name
    """name under which later steps use the scores"""
    by: str
    """attention_received, norm, cosine, random, or the name of a plug-in"""
    at: AddressText | None = None
    """address: an attention site for attention_received, else a value that has tokens (decoder.2.input)"""
    of: Name | None = None
    """name of a tap to score, in place of at"""
    queries: one_of("all", "last", "cls", "text", numbered="last") = "all"
    """rows of the attention that count: all, last, cls, text, or the last N as last:N"""
    heads: one_of("mean", "max", "sum") = "mean"
    """how heads are brought together"""
    reduce: one_of("mean", "sum") = "mean"
    """how the rows of several queries are brought together"""
    to: Name | None = None
    """reference of a cosine: a tap, or cls, mean, last_text"""
    p: NormOrder = 2
    """order of a norm: 1, 2 or inf"""
    seed: IntOrExpression = 0
    """seed of random scores"""
    largest: Truth = True
    """whether a large value means keep"""

    @model_validator(mode="after")
    def _check(self) -> Score:
        known_by(self, self.by)
        rows = ("attention_received",)
        users = {"queries": rows, "heads": rows, "reduce": rows, "to": ("cosine",), "p": ("norm",), "seed": ("random",)}
        refuses(self, {**users, "of": ("norm", "cosine", "random")}, self.by)
        if (self.at is None) == (self.of is None):
            raise wrong("a score needs one of 'at' and 'of'", "at: the address, or of: the name of a tap")
        if self.by == "cosine":
            needs(self, ("to",), self.by)
        if self.at is not None:
            is_rows = self.by in rows
            parts = ("attention",) if is_rows else ("attention", "input", "patches", "output")
            single_part(self, parts, f"by: {self.by}")
        return self
