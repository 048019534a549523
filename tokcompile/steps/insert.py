"""The fields of an insert step."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from pydantic import model_validator

from tokcompile.address import parse_address
from tokcompile.budget import round_ratio
from tokcompile.expr import has_expression
from tokcompile.fields import AddressText, IntOrExpression, Name, Number, PlaceList, Share, Truth, one_of, wrong
from tokcompile.steps.base import Step, single_part


class Insert(Step):
    """Puts tokens that are none of the model's own into a sequence, from an address on."""

    verb = "insert"
    makes = False

    name: Name
    """name of the tokens; where they are learned, of the parameter that holds them: RULE.NAME"""
    at: AddressText
    """address from which they are there"""
    where: one_of("front", "patches", "end", "every", "random", "listed", numbered="every") = "front"
    """front (of all real tokens), patches (between class tokens and patches), end (behind the last real token), every:N
    (after each N tokens), every (the same, N from share), random (seeded places, the same in each row), or listed"""
    count: IntOrExpression | None = None
    """tokens inserted; with every:N those at each place (1 by default)"""
    share: Share | None = None
    """tokens inserted as a share of those there are: the nearest whole number at random places, or one after each N
    tokens, N the whole number nearest to 1 / share (random, every)"""
    places: PlaceList | None = None
    """old tokens in front of each inserted one, ascending (listed)"""
    seed: IntOrExpression = 0
    """seed of random places, or of random content"""
    content: one_of("learned", "zero", "mean", "prefix_suffix", "repeat", "random") = "learned"
    """what they hold: learned vectors, zeros, the mean of the real tokens; copies of each row's first and last real
    tokens (prefix_suffix), of the last one (repeat), or random ones of the model's vocabulary (random)"""
    lead: IntOrExpression = 4
    """how many are copies of the first tokens; all others are of the last (prefix_suffix)"""
    shared: Truth = False
    """whether one learned vector stands at all places"""
    std: Number = 0.02
    """standard deviation of learned vectors at the start; 0 for zeros"""
    positions: one_of("keep", "compact") = "keep"
    """rotary positions of the old tokens: keep their own, or those in the longer sequence (compact)"""
    fresh: one_of("none", "count", "follow") = "none"
    """rotary positions of inserted tokens: none (they are not turned), those in the longer sequence (count), or those
    that tokens after the text would have, from its last one on (follow)"""
    until: AddressText | None = None
    """address from which they are gone again: head.input, so that logits are those of the old tokens"""
    cached: Truth = True
    """whether the caches that a prompt leaves hold the inserted tokens"""
    readout: one_of("none", "tokens") = "none"
    """tokens: the inserted tokens, after the last norm, are the model's first output"""
    flatten: Truth = False
    """whether the inserted tokens are read out as one vector [B, M * C]"""
    normalise: one_of("none", "l2") = "none"
    """l2: what is read out has length 1 (each vector)"""

    @property
    def into_text(self) -> bool:
        """Whether the sequence is a text, which later steps continue."""
        return parse_address(self.at).stack in ("decoder", "embedding", "splice")

    @model_validator(mode="after")
    def _check(self) -> Insert:
        single_part(self, ("input", "output", "middle"), "an insertion")
        self._check_places()
        if self.fresh == "count" and self.positions == "keep":
            raise wrong("two tokens would have one position", "give positions: compact, or fresh: none")
        if self.fresh == "follow" and (self.positions != "keep" or self.where != "end"):
            raise wrong("only tokens behind the text can follow it", "where: end, and positions: keep")
        if self.cached is False and (self.positions != "keep" or self.until is None):
            raise wrong(
                "caches without the inserted tokens go on from the old ones alone, at their positions",
                "positions: keep, and until: head.input",
            )
        self._check_content()
        if self.until is not None:
            until = parse_address(self.until)
            if not until.is_single or until.part not in ("input", "output", "middle"):
                raise wrong(f"'{self.until}' is not a place where tokens can be taken out", "for example head.input")
        if self.readout == "none" and {"flatten", "normalise"} & self.model_fields_set and self._reads_nothing():
            raise wrong("'flatten' and 'normalise' belong to readout: tokens", "give it, or remove them")
        if self.readout == "tokens" and self.until is not None:
            raise wrong("tokens that are gone cannot be read out", "remove 'until'")
        return self

    def _check_content(self) -> None:
        if _is_number(self.lead) and self.lead < 0:
            raise wrong(f"{self.lead} tokens cannot be copied", "0 or more")
        if self.content == "random" and parse_address(self.at).stack != "embedding":
            raise wrong("random tokens of the vocabulary are put in as embeddings", "at: embedding.output")

    def _reads_nothing(self) -> bool:
        return self.flatten is True or self.normalise == "l2"

    def _check_places(self) -> None:
        where = str(self.where)
        needed: dict[str, tuple[str, ...]] = {"listed": ("places",), "random": ("count", "share"), "every": ("share",)}
        allowed = needed.get(where, ("count",))
        if has_expression(where):
            return
        given = [key for key in ("count", "share", "places") if getattr(self, key) is not None]
        for key in given:
            if key not in allowed:
                raise wrong(f"'where: {where}' does not use '{key}'", f"give {' or '.join(allowed)}")
        if len(given) != 1 and not (where.startswith("every:") and not given):
            raise wrong(f"'where: {where}' needs one of {', '.join(allowed)}", "give it")
        if _is_number(self.count) and self.count < 0:
            raise wrong(f"{self.count} tokens cannot be inserted", "0 or more")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def period_of(step: Insert) -> int | None:
    """After how many tokens others follow; None for a share of none."""
    number = step.where.partition(":")[2]
    if number:
        return int(number)
    share = Fraction(step.share)
    return round_ratio(share.denominator, share.numerator, "half_even") if share else None
