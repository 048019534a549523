"""What a route asks of each way to choose keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from tokcompile.editing.edit import Length
from tokcompile.passes.context import Context
from tokcompile.sites import Block
from tokcompile.steps import Route


@dataclass(frozen=True, eq=False)
class Routed:
    """One attention of a later step.

    Attributes:
        index: number of its block.
        key: all its keys, [B, Hkv, N, D].
        valid: bool [B, N], real tokens; None: all are.
        queries, tokens: how many queries and keys there are.
        last: how many of the last keys are chosen in any case.
        count: how many keys are chosen.
    """

    index: int
    block: Block
    key: Node
    valid: Node | None
    queries: Length
    tokens: Length
    last: Length
    count: Length


class Chooser:
    """Scores the keys of attentions, one after the other.

    Attributes:
        ctx, step: of the rule that is applied.
    """

    def __init__(self, ctx: Context, step: Route, blocks: Sequence[Block]) -> None:
        """Look at the blocks; it raises what a model lacks."""
        self.ctx, self.step, self.blocks = ctx, step, blocks

    def prepare(self, index: int, block: Block, key: Node) -> None:
        """In a prompt's graph, check and hand on what later steps need of a block."""

    def score(self, routed: Routed) -> Node:
        """Numbers [B, G, N], large ones for keys to be chosen."""
        raise NotImplementedError

    def settle(self, routed: Routed, chosen: Node) -> Node:
        """The choice that is used, of one shape with a new one, int64 [B, G, k]."""
        return chosen

    def place(self, routed: Routed, chosen: Node, keys: Node) -> tuple[Node, Node]:
        """Queries and chosen keys as the attention reads them."""
        return routed.block.attention.query, keys
