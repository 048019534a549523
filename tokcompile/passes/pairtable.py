"""route, by frequencies: a few pairs of each head, found once for a model, rank its keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from tokcompile.errors import EditError, RuleError
from tokcompile.passes.context import Context
from tokcompile.passes.routing import Chooser, Routed
from tokcompile.program import place
from tokcompile.sites import Block
from tokcompile.sites.pairing import find_pairings
from tokcompile.steps import Route

aten = torch.ops.aten
tokred = torch.ops.tokred
TABLE = "pairs"
"""Name of the table among a rule's weights: int16 [blocks, heads, pairs]."""


class ByPairs(Chooser):
    """Keys are scored by the part of their logits that some pairs make.

    FASA (2026), section 3. Which pairs these are stands in a table among the rule's weights: `tokcompile.calibrate`.
    """

    def __init__(self, ctx: Context, step: Route, blocks: Sequence[Block]) -> None:
        """Find the pairs.

        Raises:
            EditError: nothing turns the queries of a block, or in a way that is not known.
        """
        super().__init__(ctx, step, blocks)
        self.pairings = find_pairings(ctx.program, ctx.sites, "decoder")
        for block in blocks:
            if block.attention not in self.pairings:
                raise EditError(
                    "keys cannot be ranked by frequencies: this attention has none",
                    where=[step.at, place(block.attention.node)],
                    found="nothing turns its queries and keys by their positions",
                    remedy="use a rule that chooses by votes",
                )

    def prepare(self, index: int, block: Block, key: Node) -> None:
        """Check that the table fits this block."""
        pairs = self.pairings[block.attention].pairs
        if int(self.step.pairs) > pairs:
            raise EditError(
                "there are fewer pairs than are to be chosen",
                where=[place(block.attention.node)],
                found=f"{self.step.pairs} of {pairs}",
                remedy=f"{pairs} or less",
            )
        rule = self.ctx.editor.rule
        table = self.ctx.program.weights.of(rule, TABLE, self._shape(block, key), self._missing)
        own = table[index]
        if own.dtype.is_floating_point or int(own.min()) < 0 or int(own.max()) >= pairs:
            raise RuleError(
                f"the table '{rule}.{TABLE}' names pairs that this model does not have",
                found=f"{own.dtype}, up to {own.max()}, of {pairs} pairs",
                remedy=self._remedy,
            )

    def score(self, routed: Routed) -> Node:
        """Scores, float32 [B, G, N], of the mean of a step's queries."""
        call, site = self.ctx.editor.call, routed.block.attention
        pairing = self.pairings[site]
        table = self.ctx.editor.parameter(TABLE, self._shape(routed.block, routed.key), self._missing)
        own = call(aten.select.int, table, 0, routed.index)
        query = call(tokred.mean_query.default, site.query, routed.valid)
        layout = (pairing.start, pairing.pairs, pairing.neighbours)
        return call(tokred.pair_scores.default, query, routed.key, own, routed.valid, *layout)

    def _shape(self, block: Block, key: Node) -> tuple[int, int, int]:
        blocks = self.ctx.sites.stacks["decoder"].blocks
        of_query = self.step.per == "query_head"
        heads = (block.attention.query if of_query else key).meta["val"].shape[1]
        return len(blocks), int(heads), int(self.step.pairs)

    @property
    def _remedy(self) -> str:
        return f"tokred calibrate MODEL --rule {self.ctx.editor.rule} --out FILE, then weights=FILE (.safetensors)"

    def _missing(self) -> Tensor:
        raise RuleError(
            f"rule '{self.ctx.editor.rule}' needs a table of pairs, which is found once for each model",
            found="no weights with such a table",
            remedy=self._remedy,
        )
