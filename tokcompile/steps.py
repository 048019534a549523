"""The steps of a rule file, one model a verb. Their fields are the keys that a rule file may use."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator

from tokcompile import plugins
from tokcompile.address import Address, parse_address
from tokcompile.budget import ROUNDINGS
from tokcompile.errors import known
from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, BudgetText, IntOrExpression, Name, NormOrder, Offsets, Truth, one_of, wrong

REFERENCES = ("cls", "mean", "last_text")
"""What `to:` of a score may name besides a tap."""


class Model(BaseModel):
    """Base of everything read from a rule file: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Step(Model):
    """Base of the steps."""

    verb: ClassVar[str]
    refers: ClassVar[dict[str, str]] = {}
    """Field -> kind of step (`tap`, `score`, `select`) whose name it holds."""
    makes: ClassVar[bool] = True
    """Whether the step makes something that later steps use by name."""

    _line: int = PrivateAttr(default=0)

    @property
    def line(self) -> int:
        """Line of the rule file where the step stands; 0 where it was not read from a file."""
        return self._line

    @property
    def address(self) -> Address | None:
        """The step's `at`, parsed; None where the step has none."""
        at = getattr(self, "at", None)
        return None if at is None else parse_address(at)

    def given(self) -> dict[str, Any]:
        """Return the fields that the rule file gave."""
        return {field: getattr(self, field) for field in type(self).model_fields if field in self.model_fields_set}


def _needs(step: Step, fields: tuple[str, ...], by: str) -> None:
    for field in fields:
        if getattr(step, field) in (None, ()):
            described = type(step).model_fields[field].description
            raise wrong(f"'by: {by}' needs '{field}'", f"add {field}: {described}")


def _refuses(step: Step, allowed: dict[str, tuple[str, ...]], by: str) -> None:
    """Refuse a field that belongs to another `by`: it would be ignored, and the user would not know."""
    if by not in plugins.BUILT_IN[step.verb]:
        return
    for field, users in allowed.items():
        if field in step.model_fields_set and by not in users:
            raise wrong(f"'by: {by}' does not use '{field}'", f"remove it; it belongs to by: {', '.join(users)}")


def _known_by(step: Step, by: str) -> None:
    names = plugins.names(step.verb)
    if not has_expression(by) and by not in names:
        raise wrong(f"no way to {step.verb} is called '{by}'", known(by, names))


def _part(step: Step, parts: tuple[str, ...], why: str) -> None:
    address = step.address
    if not address.is_single:
        raise wrong(f"'{address}' means every block, and '{step.verb}' needs one place", "give one block: decoder.2")
    if address.part not in parts:
        raise wrong(f"'{address}' is not a place for {why}", f"an address that ends in .{' or .'.join(parts)}")


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
            _part(self, ("attention",), f"what: {self.what}")
        else:
            _part(self, ("attention", "input", "output"), "a tap")
        return self


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
        _known_by(self, self.by)
        rows = ("attention_received",)
        users = {"queries": rows, "heads": rows, "reduce": rows, "to": ("cosine",), "p": ("norm",), "seed": ("random",)}
        _refuses(self, {**users, "of": ("norm", "cosine", "random")}, self.by)
        if (self.at is None) == (self.of is None):
            raise wrong("a score needs one of 'at' and 'of'", "at: the address, or of: the name of a tap")
        if self.by == "cosine":
            _needs(self, ("to",), self.by)
        if self.at is not None:
            is_rows = self.by in rows
            _part(self, ("attention",) if is_rows else ("attention", "input", "output"), f"by: {self.by}")
        return self


class Select(Step):
    """Chooses tokens."""

    verb = "select"
    refers = {"scores": "score", "of": "select", "first": "select"}

    name: Name
    """name under which later steps use the selection"""
    by: str
    """topk, neighbours, fill, protect, or the name of a plug-in"""
    scores: Name | None = None
    """the scores that decide (topk, fill)"""
    among: one_of("image", "text", "all") = "image"
    """the tokens that may be chosen; all others stay"""
    keep: BudgetText | None = None
    """how many are chosen of each group: a count (192), a ratio (0.5, "1/3") or an expression that gives a count"""
    round: one_of(*ROUNDINGS) = "floor"
    """how a share that is no whole number is rounded: floor (n * p // q), half_even, half_up or ceil"""
    allow_zero: Truth = False
    """whether a budget that rounds to 0 stays 0; else at least one token is kept"""
    of: Name | None = None
    """the selection whose neighbours are chosen"""
    offsets: Offsets = "cross"
    """neighbours on the patch grid: cross (itself and 4), square (itself and 8), or pairs [rows, columns]"""
    edges: one_of("clamp_flat", "grid") = "clamp_flat"
    """clamp_flat: raster index plus offset, clamped to the image (wraps at row ends); grid: true neighbours only"""
    first: tuple[Name, ...] = ()
    """selections that come first, in order of priority; scores fill the rest of the budget"""
    per: one_of("image", "row") = "image"
    """the group that a budget counts in: each image (each row, for text and all), or each batch row"""
    protect: tuple[one_of("first", "last"), ...] = ()
    """real tokens of each row that are chosen"""

    @model_validator(mode="after")
    def _check(self) -> Select:
        _known_by(self, self.by)
        counted, stencil = ("topk", "fill"), ("neighbours",)
        users = {"scores": counted, "keep": counted, "round": counted, "allow_zero": counted, "of": stencil}
        users |= {"offsets": stencil, "edges": stencil, "first": ("fill",), "protect": ("protect",)}
        _refuses(self, users, self.by)
        needs = {"topk": ("scores", "keep"), "fill": ("scores", "keep", "first"), "neighbours": ("of",)}
        _needs(self, {**needs, "protect": ("protect",)}.get(self.by, ()), self.by)
        return self


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
        _part(self, ("input", "output"), "a drop")
        return self


STEPS: dict[str, type[Step]] = {step.verb: step for step in (Tap, Score, Select, Drop)}
PLANNED = ("merge", "mark", "insert", "place", "rotate", "route", "evict", "draft")
"""Verbs that belong to the language and are not carried out by this version."""
