"""The fields of an evict step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, Name, one_of, wrong
from tokcompile.steps.base import Step


class Evict(Step):
    """Shortens caches, after the prompt or at every step: keys and values that a selection did not choose are freed."""

    verb = "evict"
    refers = {"keep": "select"}
    makes = False

    at: AddressText = "decoder.*.cache"
    """caches of the blocks: decoder.*.cache, or one block's: decoder.3.cache"""
    keep: Name
    """the selection, made at the same caches, that stays"""
    when: one_of("prefill", "decode", "both") = "prefill"
    """after the prompt, at every later step, or both: then the caches never hold more than the budget"""
    positions: one_of("keep", "rank") = "keep"
    """keep: keys stay at the positions that they had; rank: later queries see them as if they stood side by side"""

    @model_validator(mode="after")
    def _check(self) -> Evict:
        if self.address.part != "cache" or self.address.stack != "decoder":
            raise wrong(f"'{self.at}' is not a place for an eviction", "caches of the decoder: decoder.*.cache")
        return self
