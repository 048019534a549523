"""What one step tells the next of the keys in a cache, where every step evicts: attention so far, and whose turn it is.

A prompt's graph hands these on for the keys that stay, and so does each later step, which adds what it saw itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch.fx import Node

from tokcompile.axes.context import MAX
from tokcompile.decoding.carried import hand_on, take
from tokcompile.editing.edit import Length, sub
from tokcompile.passes.context import Context
from tokcompile.sites import Block
from tokcompile.sites.cache import Cache
from tokcompile.steps import Evict, Select

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class KeyState:
    """Numbers of one block's cache by name: of each key of each head, float32 [B, H, T], or of each row, int64 [B]."""

    of_keys: dict[str, Node] = field(default_factory=dict)
    of_rows: dict[str, Node] = field(default_factory=dict)

    def with_keys(self, **values: Node) -> KeyState:
        """The same with further numbers of keys."""
        return replace(self, of_keys={**self.of_keys, **values})

    def with_rows(self, **values: Node) -> KeyState:
        """The same with further numbers of rows."""
        return replace(self, of_rows={**self.of_rows, **values})


def in_later_step(ctx: Context) -> bool:
    """Whether this graph goes on from a cache."""
    return ctx.sites.phase == "decode"


def evicts_later(ctx: Context, scores: str) -> bool:
    """Whether steps after the prompt evict by scores of this name."""
    steps = ctx.instance.steps
    chosen = {step.name for step in steps if isinstance(step, Select) and step.scores == scores}
    return any(isinstance(step, Evict) and step.keep in chosen and step.when != "prefill" for step in steps)


def told_of_keys(
    ctx: Context, block: int, cache: Cache, name: str, what: str = "what its prompt's queries saw"
) -> Node:
    """A number of each key that an earlier graph handed on, float32 [B, H, T], with zeros for the keys of this step."""
    past, key = cache.past.meta["val"], cache.key
    with ctx.program.fake_mode:
        like = past.new_empty(past.shape[:3], dtype=torch.float32)
    held = take(ctx.program, f"{name}_{block}", like, what)
    with ctx.editor.after([held, key]):
        rows, heads = (ctx.editor.size(key, dim) for dim in (0, 1))
        new = ctx.editor.arithmetic(sub, ctx.editor.size(key, 2), ctx.editor.size(cache.past, 2))
        zeros = ctx.editor.call(aten.new_zeros.default, held, [rows, heads, new])
        return ctx.editor.call(aten.cat.default, [held, zeros], 2)


def told_of_rows(ctx: Context, block: int, cache: Cache, name: str) -> Node:
    """A number of each row that an earlier graph handed on, int64 [B]."""
    past = cache.past.meta["val"]
    with ctx.program.fake_mode:
        like = past.new_empty(past.shape[0], dtype=torch.int64)
    return take(ctx.program, f"{name}_{block}", like, "how many keys were evicted before")


def hand_on_state(ctx: Context, block: int, state: KeyState, index: Node | None) -> None:
    """Tell later steps of the keys that stay.

    Args:
        index: int64 [B, H, k], which do; None: all.
    """
    for name, values in state.of_keys.items():
        if index is not None:
            with ctx.editor.after([values, index]):
                values = ctx.editor.call(aten.gather.default, values, 2, index)
        hand_on(ctx.program, f"{name}_{block}", values)
    for name, values in state.of_rows.items():
        hand_on(ctx.program, f"{name}_{block}", values)


def attention_here(ctx: Context, block: Block, cache: Cache) -> tuple[Node | None, bool]:
    """What an attention's queries see as an explicit mask, and whether it is causal beside that.

    A two-dimensional mask of padding may be longer or shorter than a cache that was shortened: its first columns tell,
    and what is beyond it is no padding.
    """
    site, call = block.attention, ctx.editor.call
    if site.padding is None or not in_later_step(ctx):
        return ctx.attention_mask(site), site.is_causal
    keys = ctx.editor.size(cache.key, 2)
    queries = ctx.editor.arithmetic(sub, keys, ctx.editor.size(cache.past, 2))
    real = call(aten.ne.Scalar, site.padding, 0)
    real = call(aten.constant_pad_nd.default, real, [0, keys], True)
    mask = call(aten.slice.Tensor, real, 1, 0, keys)
    for at in (1, 1):
        mask = call(aten.unsqueeze.default, mask, at)
    if site.is_causal and queries != 1:
        device = site.padding.meta["val"].device
        row = call(aten.arange.default, queries, device=device)
        row = call(aten.add.Tensor, row, ctx.editor.arithmetic(sub, keys, queries))
        order = call(aten.arange.default, keys, device=device)
        seen = call(aten.le.Tensor, order, call(aten.unsqueeze.default, row, 1))
        mask = call(aten.logical_and.default, mask, seen)
    return mask, False


def seen_keys(ctx: Context, block: Block, cache: Cache) -> Node | None:
    """bool [B, T]: the keys that the newest query of a later step sees, all but padding; None where it sees all."""
    mask, _ = attention_here(ctx, block, cache)
    if mask is None:
        return None
    call, value = ctx.editor.call, mask.meta["val"]
    for _ in range(4 - value.ndim):
        mask = call(aten.unsqueeze.default, mask, 0)
    row = call(aten.select.int, call(aten.slice.Tensor, mask, 2, -1, MAX), 2, 0)
    row = call(aten.select.int, row, 1, 0)
    if value.dtype != torch.bool:
        row = call(aten.gt.Scalar, row, torch.finfo(torch.float32).min / 2)
    sizes: list[Length] = [ctx.editor.size(cache.key, 0), ctx.editor.size(cache.key, 2)]
    return call(aten.expand.default, row, sizes)
