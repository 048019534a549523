"""The fields of a select step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.budget import ROUNDINGS
from tokcompile.fields import BudgetText, IntOrExpression, Name, Offsets, Share, Truth, one_of, wrong
from tokcompile.steps.base import Step, known_by, needs, refuses


class Select(Step):
    """Chooses tokens."""

    verb = "select"
    budgeted = "keep"
    refers = {"scores": "score", "like": "tap", "of": "select", "first": "select"}

    name: Name
    """name under which later steps use the selection"""
    by: str
    """topk, neighbours, fill, diverse, protect, pooled, pairwise (of caches), or the name of a plug-in"""
    scores: Name | None = None
    """the scores that decide (topk, fill, pairwise); or that say with which token to begin, by default the one that is
    farthest from its nearest (diverse)"""
    like: Name | None = None
    """tap of what tokens are compared by: the next is the one whose cosine to the nearest chosen one is the least
    (diverse)"""
    among: one_of("image", "text", "all") = "image"
    """the tokens that may be chosen; all others stay"""
    keep: BudgetText | None = None
    """how many are chosen of each group: a count (192), a ratio (0.5, "1/3") or an expression that gives a count"""
    round: one_of(*ROUNDINGS) = "floor"
    """how a share that is no whole number is rounded: floor (n * p // q), half_even, half_up or ceil"""
    allow_zero: Truth = False
    """whether a budget that rounds to 0 stays 0; else at least one token is kept"""
    of: Name | None = None
    """the selection whose neighbours are chosen (neighbours), or of whose patches features are made (pooled)"""
    offsets: Offsets = "cross"
    """neighbours on the patch grid: cross (itself and 4), square (itself and 8), or pairs [rows, columns]"""
    edges: one_of("clamp_flat", "grid") = "clamp_flat"
    """clamp_flat: raster index plus offset, clamped to the image (wraps at row ends); grid: true neighbours only"""
    first: tuple[Name, ...] = ()
    """selections that come first, in order of priority; scores fill the rest of the budget"""
    per: one_of("image", "row") = "image"
    """the group that a budget counts in: each image (each row, for text and all), or each batch row"""
    windows: IntOrExpression = 1
    """windows of the patch grid above and beside each other that each get an equal part of the budget; what is left
    over when it is shared out is lost (topk)"""
    sinks: IntOrExpression = 0
    """how many of each row's first real tokens are chosen in any case and count in the budget (scores of caches)"""
    recent: IntOrExpression = 0
    """how many of each row's last real tokens are chosen in any case and count in the budget (scores of caches)"""
    taper: IntOrExpression = 1
    """budgets fall evenly from the first block to the last, which gets 1/taper of the mean; 1: all are alike (scores
    of caches)"""
    heads: one_of("each", "joint") = "each"
    """each: every cached head keeps as many keys; joint: the largest scores of all heads of a block together stay, and
    `keep` is what a head keeps on average (scores of caches)"""
    floor: Share = 0
    """share of `keep` that a head is sure of, from 0 to 1 (heads: joint)"""
    floor_by: one_of("blend", "reserve") = "blend"
    """blend: a head's count is the mean of `keep` and of how many it would have without a floor, weighed by the floor;
    reserve: each head's best share of `keep`, at least one key, stay, and the largest of all fill up (heads: joint)"""
    protect: tuple[one_of("first", "last"), ...] = ()
    """real tokens of each row that are chosen"""

    @model_validator(mode="after")
    def _check(self) -> Select:
        known_by(self, self.by)
        counted, stencil = ("topk", "fill", "diverse", "pairwise"), ("neighbours",)
        sized = (*counted, "pooled")
        users = {"scores": counted, "keep": sized, "round": sized, "allow_zero": counted, "of": (*stencil, "pooled")}
        users |= {
            "like": ("diverse",),
            "offsets": stencil,
            "edges": stencil,
            "first": ("fill",),
            "protect": ("protect",),
            "windows": ("topk",),
            "sinks": ("topk", "pairwise"),
            "recent": ("topk", "pairwise"),
            "taper": ("topk",),
        }
        users |= dict.fromkeys(("heads", "floor", "floor_by"), ("topk",))
        refuses(self, users, self.by)
        required = {"topk": ("scores", "keep"), "fill": ("scores", "keep", "first"), "neighbours": ("of",)}
        required |= {"protect": ("protect",), "pooled": ("of", "keep"), "pairwise": ("scores", "keep")}
        required |= {"diverse": ("like", "keep")}
        needs(self, required.get(self.by, ()), self.by)
        alone = [f for f in ("floor", "floor_by") if f in self.model_fields_set and self.heads == "each"]
        if alone and "heads" not in self.model_fields_set:
            raise wrong(f"'{alone[0]}' is of budgets that heads share", "add heads: joint, or remove it")
        return self
