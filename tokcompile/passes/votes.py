"""route, by votes: all heads of a block choose its keys together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.decoding.carried import hand_on, take
from tokcompile.editing.edit import sub
from tokcompile.passes.context import Context
from tokcompile.passes.ranked import turnable
from tokcompile.passes.routing import Chooser, Routed
from tokcompile.sites import Block
from tokcompile.steps import Route

aten = torch.ops.aten
tokred = torch.ops.tokred


class ByVotes(Chooser):
    """Each head shares out one vote among the keys between the first and the last ones; the sums decide.

    TokenSelect (Wu et al. 2024), section 4. Under `positions: rank` keys are scored as if they all stood at position 0
    and the queries from `recent` on, and those chosen are attended to at positions 0, 1, 2...: cached keys are turned
    back by the positions that they have.
    """

    def __init__(self, ctx: Context, step: Route, blocks: Sequence[Block]) -> None:
        """Find the rotations, where keys are placed anew.

        Raises:
            EditError: there are none, or none that can be undone.
        """
        super().__init__(ctx, step, blocks)
        self.ranked = step.positions == "rank"
        self.reuses = float(step.reuse) <= 1
        self.pairings = turnable(ctx, step.at, blocks) if self.ranked else {}
        self.summaries: dict[int, Node] = {}
        self.positions: dict[int, tuple[Node, Node]] = {}

    def prepare(self, index: int, block: Block, key: Node) -> None:
        """Hand on that nothing is chosen yet."""
        if not self.reuses:
            return
        query, call = block.attention.query, self.ctx.editor.call
        rows, (_, heads, _, width) = self.ctx.editor.size(query, 0), query.meta["val"].shape
        how = {"device": query.meta["val"].device}
        with self.ctx.editor.after([query]):
            summary = call(aten.full.default, [rows, heads * width], 0.0, dtype=torch.float32, **how)
            picked = call(aten.full.default, [rows, 1, self._early], -1, dtype=torch.int64, **how)
        hand_on(self.ctx.program, _summary(index), summary)
        hand_on(self.ctx.program, _picked(index), picked)

    @property
    def _early(self) -> int:
        """How many keys are chosen beside the last ones."""
        return int(self.step.keep) - max(int(self.step.recent), 1)

    def score(self, routed: Routed) -> Node:
        """Votes, float32 [B, 1, N]."""
        call, query, key = self.ctx.editor.call, routed.block.attention.query, routed.key
        if self.ranked:
            here, pos = self._positions(routed)
            there = call(aten.arange.default, routed.queries, device=query.meta["val"].device)
            there = call(aten.unsqueeze.default, call(aten.add.Tensor, there, int(self.step.recent)), 0)
            query = self._turn(routed, query, here, there)
            key = self._turn(routed, key, pos, call(aten.zeros_like.default, pos))
        summary = call(tokred.mean_query.default, query, routed.valid)
        self.summaries[routed.index] = summary
        votes = call(tokred.key_votes.default, summary, key, routed.valid, int(self.step.sinks), routed.last)
        if int(self.step.smooth) == 1:
            return votes
        return call(tokred.smooth_keys.default, votes, routed.valid, 0, int(self.step.smooth), "max")

    def place(self, routed: Routed, chosen: Node, keys: Node) -> tuple[Node, Node]:
        """Turn chosen keys and the queries to their ranks among the real tokens chosen."""
        query, call = routed.block.attention.query, self.ctx.editor.call
        if not self.ranked:
            return query, keys
        here, pos = self._positions(routed)
        flat = call(aten.select.int, chosen, 1, 0)
        if routed.valid is None:
            real = call(aten.ones_like.default, flat)
        else:
            real = call(aten.gather.default, routed.valid, 1, flat)
        ranks = call(aten.sub.Tensor, call(aten.cumsum.default, real, 1), 1)
        ranks = call(aten.clamp_min.default, ranks, 0)
        start = self.ctx.editor.arithmetic(sub, routed.count, routed.queries)
        own = call(aten.slice.Tensor, ranks, 1, start, MAX)
        keys = self._turn(routed, keys, call(aten.gather.default, pos, 1, flat), ranks)
        return self._turn(routed, query, here, own), keys

    def settle(self, routed: Routed, chosen: Node) -> Node:
        """The last choice once more, with what has come since, where the queries point the same way as then.

        TokenSelect, section 4.3: rows whose tokens all fit have not chosen, and the first choice is always made.
        """
        if not self.reuses:
            return chosen
        call, editor, program = self.ctx.editor.call, self.ctx.editor, self.ctx.program
        summary = call(aten.flatten.using_ints, self.summaries[routed.index], 1)
        rows = editor.size(chosen, 0)
        with program.fake_mode:
            likes = (
                summary.meta["val"].new_empty(summary.meta["val"].shape),
                chosen.meta["val"].new_empty((summary.meta["val"].shape[0], 1, self._early)),
            )
        what = "which keys the last step chose"
        before = take(program, _summary(routed.index), likes[0], what)
        held = take(program, _picked(routed.index), likes[1], what)
        if routed.valid is None:
            real = call(aten.full.default, [rows], routed.tokens, dtype=torch.int64, device=likes[0].device)
        else:
            real = call(aten.sum.dim_IntList, routed.valid, [1])
        more = call(aten.gt.Scalar, real, routed.count)
        again = call(tokred.alike.default, summary, before, float(self.step.reuse))
        made = call(aten.ge.Scalar, call(aten.select.int, call(aten.select.int, held, 1, 0), 1, -1), 0)
        again = call(aten.logical_and.default, call(aten.logical_and.default, again, made), more)
        final = call(tokred.reuse_keys.default, held, chosen, again, routed.last)
        self._keep(routed, chosen, (again, more), (before, summary), held)
        return final

    def _keep(
        self, routed: Routed, chosen: Node, flags: tuple[Node, Node], summaries: tuple[Node, Node], held: Node
    ) -> None:
        """Hand on the choice that is in use, and the queries that made it; -1 where all keys fit."""
        call, editor = self.ctx.editor.call, self.ctx.editor
        again, more = flags
        early = editor.arithmetic(sub, routed.count, routed.last)
        spare = editor.arithmetic(lambda n: self._early - n, early)
        new = call(aten.slice.Tensor, chosen, 2, 0, early)
        new = call(aten.constant_pad_nd.default, new, [0, spare], -1)
        nothing = call(aten.full_like.default, held, -1)
        more, wide = (_unsqueezed(self.ctx, flag, 2) for flag in (more, again))
        picked = call(aten.where.self, wide, held, call(aten.where.self, more, new, nothing))
        summary = call(aten.where.self, _unsqueezed(self.ctx, again, 1), *summaries)
        hand_on(self.ctx.program, _summary(routed.index), summary)
        hand_on(self.ctx.program, _picked(routed.index), picked)

    def _positions(self, routed: Routed) -> tuple[Node, Node]:
        """Positions of the step's tokens, int64 [B or 1, T], and of all keys, int64 [B, N]."""
        if routed.index in self.positions:
            return self.positions[routed.index]
        call, editor = self.ctx.editor.call, self.ctx.editor
        given = self.pairings[routed.index].frequencies.positions
        here = call(aten.to.dtype, call(aten.reshape.default, given, [-1, routed.queries]), torch.int64)
        pos = call(tokred.key_positions.default, here, routed.valid, routed.key)
        start = editor.arithmetic(sub, routed.tokens, routed.queries)
        agree = call(aten.eq.Tensor, call(aten.slice.Tensor, pos, 1, start, MAX), here)
        if routed.valid is not None:
            padding = call(aten.logical_not.default, call(aten.slice.Tensor, routed.valid, 1, start, MAX))
            agree = call(aten.logical_or.default, agree, padding)
        editor.require(
            agree,
            "keys cannot be placed by rank: positions of this step do not follow on those of the tokens before it "
            "(use positions: keep)",
        )
        self.positions[routed.index] = here, pos
        return here, pos

    def _turn(self, routed: Routed, value: Node, here: Node, there: Node) -> Node:
        pairing = self.pairings[routed.index]
        how = (pairing.frequencies.inverse, pairing.start, pairing.neighbours)
        return self.ctx.editor.call(tokred.turn_pairs.default, value, here, there, *how)


def _unsqueezed(ctx: Context, flag: Node, times: int) -> Node:
    for _ in range(times):
        flag = ctx.editor.call(aten.unsqueeze.default, flag, -1)
    return flag


def _summary(block: int) -> str:
    return f"summary_{block}"


def _picked(block: int) -> str:
    return f"picked_{block}"
