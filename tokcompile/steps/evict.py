"""The fields of an evict step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.fields import AddressText, Name, wrong
from tokcompile.steps.base import Step


class Evict(Step):
    """Shortens the caches that a prompt leaves: keys and values that a selection did not choose are freed."""

    verb = "evict"
    refers = {"keep": "select", "merged": "merge"}
    makes = False

    at: AddressText = "decoder.*.cache"
    """caches of the blocks: decoder.*.cache, or one block's: decoder.3.cache"""
    keep: Name
    """the selection, made at the same caches, that stays"""
    merged: Name | None = None
    """a merge of the same caches around that selection: what stays is then the means that it makes"""

    @model_validator(mode="after")
    def _check(self) -> Evict:
        if self.address.part != "cache" or self.address.stack != "decoder":
            raise wrong(f"'{self.at}' is not a place for an eviction", "caches of the decoder: decoder.*.cache")
        return self
