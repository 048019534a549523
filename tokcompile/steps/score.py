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
    """attention_received, norm, cosine, random, recency (at a cache), or the name of a plug-in"""
    at: AddressText | None = None
    """address: an attention site for attention_received, else a value that has tokens (decoder.2.input); or caches,
    whose keys are scored for each of their heads: decoder.*.cache"""
    of: Name | None = None
    """name of a tap to score, in place of at"""
    queries: one_of("all", "last", "cls", "text", numbered="last") = "all"
    """rows of the attention that count: all, last, cls, text, or the last N as last:N, also last:${window}"""
    heads: one_of("mean", "max", "sum") = "mean"
    """how heads are brought together: all, or at a cache the query heads that share a cached head"""
    reduce: one_of("mean", "sum", "seen") = "mean"
    """how the rows of several queries are brought together; seen, at a cache: mean over the rows that see the key"""
    smooth: IntOrExpression = 1
    """neighbouring keys whose scores are pooled, an odd number (at a cache); the last queries' own keys are not"""
    pool: one_of("avg", "max") = "avg"
    """how neighbours are pooled (at a cache)"""
    shared: Truth = False
    """whether all cached heads of a block have the same scores, from all query heads (attention_received at a cache)"""
    accumulate: Truth = True
    """whether the attention of later steps is added to the prompt's, where these evict; else a step counts its own
    queries alone (attention_received at a cache)"""
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
        users |= {"smooth": rows, "pool": rows, "shared": rows, "accumulate": rows}
        refuses(self, {**users, "of": ("norm", "cosine", "random")}, self.by)
        if (self.at is None) == (self.of is None):
            raise wrong("a score needs one of 'at' and 'of'", "at: the address, or of: the name of a tap")
        if self.by == "cosine":
            needs(self, ("to",), self.by)
        if self.at is not None and self.of_caches:
            self._check_cache()
        elif self.at is not None:
            self._check_not_cache()
            is_rows = self.by in rows
            parts = ("attention",) if is_rows else ("attention", "input", "patches", "output")
            single_part(self, parts, f"by: {self.by}")
        return self

    @property
    def of_caches(self) -> bool:
        """Whether keys of caches are scored."""
        return self.at is not None and self.address.part == "cache"

    def _check_cache(self) -> None:
        if self.address.stack != "decoder":
            raise wrong(f"'{self.at}' is no cache", "caches of the decoder: decoder.*.cache")
        if self.by == "cosine" and self.to != "mean":
            raise wrong(f"keys of a cache have no 'to: {self.to}'", "to: mean, the mean direction of a head's keys")
        if self.by == "attention_received" and self.queries in ("cls", "text"):
            raise wrong(f"'queries: {self.queries}' does not count at a cache", "all, last or last:N")
        if isinstance(self.smooth, int) and (self.smooth < 1 or self.smooth % 2 == 0):
            raise wrong(f"'smooth: {self.smooth}' has no middle", "an odd number")

    def _check_not_cache(self) -> None:
        if self.by == "recency":
            raise wrong("'by: recency' scores keys of caches", "at: decoder.*.cache")
        given = [name for name in ("smooth", "pool", "shared", "accumulate") if name in self.model_fields_set]
        if given or self.reduce == "seen":
            raise wrong(f"'{(given or ['reduce: seen'])[0]}' belongs to scores of caches", "at: decoder.*.cache")
