"""The fields of a merge step."""

from __future__ import annotations

from pydantic import model_validator

from tokcompile.budget import ROUNDINGS
from tokcompile.fields import (
    AddressText,
    BudgetText,
    CountList,
    IntOrExpression,
    Name,
    Number,
    Share,
    Truth,
    one_of,
    wrong,
)
from tokcompile.steps.base import Step, known_by, needs, refuses, single_part


class Merge(Step):
    """Makes fewer tokens of those of a sequence: each new one is a combination of old ones."""

    verb = "merge"
    refers = {"keep": "select", "like": "tap", "scores": "score"}
    makes = False
    budgeted = "tokens"

    by: str
    """pairs, pool, nearest, kmeans, transport, clips, density_peaks, super_tokens, likeness (of a cache's keys), or the
    name of a plug-in"""
    at: AddressText
    """address from which the new tokens stand in place of the old ones; vision.*.middle means every block; or caches,
    decoder.*.cache"""
    name: Name | None = None
    """name under which later steps find the members of merged tokens (density_peaks, likeness)"""
    count: CountList | None = None
    """pairs that are merged in each block, a number or a list with one for each block (pairs); tokens that others are
    merged to (nearest); clusters (kmeans)"""
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
    """selection of tokens that stay: in front of the merged ones (nearest), or with all others poured into them
    (transport); tokens of each frame that are not dropped at once (clips); keys that others are merged into
    (likeness)"""
    scores: Name | None = None
    """scores of the same cache, which tokens are weighed by (likeness)"""
    alike: Number = 0
    """a key that is less alike than this to all that stay is merged into none of them, from 0 to 1 (likeness)"""
    spare: Number = 0
    """share of all scores that is lost with the tokens of the smallest, which are merged into none (likeness)"""
    space: one_of("plain", "turned") = "plain"
    """whether keys are compared and averaged as they are without their rotary positions, a mean then being turned at
    the place of the one that stays, or as the cache has them (likeness)"""
    merge_keys: Truth = True
    """whether keys are averaged as values are, or stay (likeness)"""
    like: Name | None = None
    """tap of what tokens are compared by, keys as their mean over heads (nearest)"""
    content: one_of("average", "sum") = "average"
    """average: mean of a token and those merged to it; sum: that token plus the mean of the others (nearest)"""
    lead: Truth = False
    """whether class tokens that the model leaves out of its features come first (nearest)"""
    seed: IntOrExpression = 0
    """seed of the tokens that clusters begin with (kmeans)"""
    tokens: BudgetText | None = None
    """how many tokens are made of each image: a count, a ratio, or an expression that gives a count (density_peaks)"""
    round: one_of(*ROUNDINGS) = "floor"
    """how a share that is no whole number is rounded: floor, half_even, half_up or ceil (density_peaks)"""
    order: one_of("score", "raster") = "score"
    """order of clusters: score, the best centre first; raster, as their centres stand (density_peaks)"""
    neighbours: IntOrExpression = 5
    """tokens, itself included, that the density of a token is counted from (density_peaks)"""
    slots: IntOrExpression = 1
    """members that are listed of each cluster, the nearest to its centre first (density_peaks)"""
    distance: Number = 0.5
    """weight of the distance on the patch grid, beside 1 - cosine, in the cost of transport (transport)"""
    temperature: Number = 0.1
    """the smaller, the nearer transport comes to the cheapest assignment (transport, clips)"""
    hard: Number = 0
    """share of the mean with the tokens that are most alike, beside what transport brings (transport)"""
    normalise: Truth = True
    """whether tokens are scaled to length one before the mean of a cluster is taken (kmeans)"""
    marginals: one_of("plan", "row") = "plan"
    """plan: each token that stays gets 1/n in all; row: all of each other token arrives (transport)"""
    write_back: Truth = False
    """whether no token is lost: merged ones stand at their places, and the others stay as they were (transport)"""
    clip: IntOrExpression | None = None
    """frames of a clip; those left over at the end are one of their own (clips)"""
    ratio: Share | None = None
    """share of the tokens of a clip's later frames that stay: of m less one, rounded up (clips)"""
    spread: Number = 1.5
    """frames after which the cost of transport is near that of frames far apart (clips)"""
    iterations: IntOrExpression = 1
    """steps of k-means (kmeans), of Sinkhorn's iteration (transport, clips), or of the assignment (super_tokens)"""
    cell: CountList = 2
    """patches of a super token's cell: the side of a square, or height and width (super_tokens)"""
    blocks: IntOrExpression | None = None
    """how many blocks, from the first on, of those that the address names; all by default (super_tokens)"""
    mask_ghosts: Truth = False
    """whether cells off the grid take no share of the patches at its edge (super_tokens)"""
    positions: one_of("keep", "compact") = "keep"
    """positions of the new tokens: keep those of the tokens that they stand for, or compact them to 0, 1, 2…"""
    restore: Truth = False
    """whether outputs of the model get their old length back, each token the value of the one that holds it"""

    @model_validator(mode="after")
    def _check(self) -> Merge:
        known_by(self, self.by)
        refuses(self, _users(), self.by)
        needs(self, _NEEDED.get(self.by, ()), self.by)
        if (self.by == "likeness") != self.of_caches:
            raise wrong(f"'{self.at}' is not a place for by: {self.by}", "caches for by: likeness: decoder.*.cache")
        if self.by == "likeness":
            self._check_cache()
        elif self.by == "pairs" and self.address.part not in ("middle", "input", "output"):
            raise wrong(f"'{self.at}' is not a place for by: pairs", "vision.*.middle, or one block: vision.3.middle")
        elif self.by == "super_tokens":
            self._check_attention()
        elif self.by != "pairs":
            single_part(self, ("input", "output", "middle", "patches"), f"by: {self.by}")
            for field in ("count", "rows", "columns", "iterations", "neighbours", "slots", "clip"):
                self._check_number(field)
        return self

    @property
    def of_caches(self) -> bool:
        """Whether keys and values of caches are merged."""
        return self.address.part == "cache"

    def _check_cache(self) -> None:
        if self.address.stack != "decoder":
            raise wrong(f"'{self.at}' is no cache", "caches of the decoder: decoder.*.cache")
        for field in ("alike", "spare"):
            value = getattr(self, field)
            if isinstance(value, int | float) and value < 0:
                raise wrong(f"'{field}: {value}' is negative", "a number from 0 on")

    def _check_attention(self) -> None:
        if self.address.part != "attention":
            raise wrong(
                f"'{self.at}' is not a place for by: super_tokens",
                "vision.*.attention, or one block: vision.0.attention",
            )
        sides = self.cell if isinstance(self.cell, tuple) else (self.cell, self.cell)
        if len(sides) != 2 or any(isinstance(side, int) and side < 1 for side in sides):
            raise wrong(f"'cell: {self.cell}' is no cell of patches", "cell: 2, or height and width: cell: [2, 4]")
        self._check_number("iterations")

    def _check_number(self, field: str) -> None:
        """Refuse a number below 1, and a list of numbers; pairs alone know what to do with these."""
        value = getattr(self, field)
        if isinstance(value, tuple) or (isinstance(value, int) and value < 1):
            raise wrong(f"'{field}: {value}' of by: {self.by} is not a number from 1 on", "a whole number, at least 1")


_FIELDS = {
    "pairs": ("count", "inflect", "metric", "proportional", "protect", "positions", "restore"),
    "pool": ("rows", "columns", "positions"),
    "nearest": ("keep", "like", "count", "content", "lead", "positions"),
    "kmeans": ("count", "iterations", "seed", "normalise", "positions"),
    "transport": ("keep", "distance", "temperature", "iterations", "hard", "marginals", "write_back", "positions"),
    "clips": ("keep", "clip", "ratio", "spread", "temperature", "iterations", "positions"),
    "density_peaks": ("name", "tokens", "round", "order", "neighbours", "slots", "positions", "restore"),
    "super_tokens": ("cell", "iterations", "mask_ghosts", "blocks"),
    "likeness": ("name", "keep", "scores", "alike", "spare", "space", "merge_keys"),
}
"""The fields that each way to merge uses beside `by` and `at`."""
_NEEDED = {
    "pairs": ("count",),
    "pool": ("rows",),
    "nearest": ("keep", "like", "count"),
    "kmeans": ("count",),
    "transport": ("keep",),
    "clips": ("keep", "clip", "ratio"),
    "density_peaks": ("tokens",),
    "likeness": ("name", "keep", "scores"),
}


def _users() -> dict[str, tuple[str, ...]]:
    fields = {field for each in _FIELDS.values() for field in each}
    return {field: tuple(by for by, used in _FIELDS.items() if field in used) for field in fields}
