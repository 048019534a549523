"""rotate, by content: angles grow from token to token by what each token says."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from tokcompile.axes import resolve
from tokcompile.decoding.carried import hand_on, take
from tokcompile.editing.transport import WHOLE
from tokcompile.errors import EditError
from tokcompile.passes.context import Context
from tokcompile.program import place as node_place
from tokcompile.rope.tables import Tables, heads_of
from tokcompile.sites.turns import Frequencies, Turn
from tokcompile.steps import Rotate

aten = torch.ops.aten
tokred = torch.ops.tokred
_NAME = "phase"
_MAX = 2**62


def rotate_content(ctx: Context, step: Rotate, found: list[Frequencies], record: dict[str, object]) -> None:
    """Let each key head turn its pair i by the sum of f^i over the tokens so far, f = 1 / (1 + softplus(x w + b)).

    CARoPE (Veisi et al. 2025), section 3. x are the embeddings that the stack reads; all its layers share w and b.
    They start as w = 0 and b such that f = base^(-2/d), which is the model's rotation with that base. Query heads share
    the phases of their key head. Tokens that a drop with `positions: keep` takes out of the stack have done their part
    of them; features that are dropped before they are put into the text have none.

    Raises:
        EditError: the rotations of the stack differ, or turn by several coordinates.
    """
    pairs, heads = _alike(found), _key_heads(found)
    record["heads"] = heads
    stack = ctx.sites.stacks[step.address.stack]
    stream = _whole_stream(
        stack.blocks[0].input, {source for each in found for turn in each.turns for source in turn.via}
    )
    first = min((turn.node for each in found for turn in each.turns), key=ctx.sites.reach.order.__getitem__)
    with ctx.editor.before(first):
        logits = _logits(ctx, step, stream, heads, 2 * pairs)
        valid = _valid(ctx, stream)
        start = _start(ctx, stream, heads, pairs) if ctx.sites.phase != "prefill" else None
        angles = ctx.editor.call(tokred.phase_scan.default, logits, valid, start, pairs, int(step.first))
        end = ctx.editor.call(aten.select.int, ctx.editor.call(aten.slice.Tensor, angles, 2, -1, _MAX), 2, 0)
        hand_on(ctx.program, _NAME, end)
    tables = Tables(ctx.editor, angles, passed=_passed(ctx, stream, found[0].turns[0]))
    tables.give(turn for each in found for turn in each.turns)


def _alike(found: list[Frequencies]) -> int:
    """How many frequencies there are, the same in all tables."""
    counts = {each.pairs for each in found}
    if len(counts) > 1 or any(each.coordinates > 1 for each in found):
        raise EditError(
            "content cannot take the place of rotations that turn by several coordinates or widths",
            where=[node_place(found[0].turns[0].node)],
            found=f"{', '.join(f'{each.pairs} frequencies of {each.coordinates} coordinates' for each in found)}",
            remedy="use it on models whose tokens count one by one",
        )
    return counts.pop()


def _key_heads(found: list[Frequencies]) -> int:
    """Heads that have angles of their own: those of the keys, which are the fewer ones."""
    return min(_heads(turn) for each in found for turn in each.turns)


def _heads(turn: Turn) -> int:
    return int(turn.value.meta["val"].shape[heads_of(turn)])


def _whole_stream(stream: Node, gathered: set[Node]) -> Node:
    """What the stack reads before tokens were dropped from it: phases count all tokens.

    Where a drop numbered positions anew, tables were not gathered by its map: phases count the tokens that it left.
    """
    while stream.target is tokred.gather_tokens.default and stream.args[1] in gathered:
        stream = stream.args[0]
    return stream


def _passed(ctx: Context, stream: Node, turn: Turn) -> int:
    """How many of a table's token maps the stream has been through: those of features that it never held."""
    own = resolve(ctx.program.axes.of(stream)[1])
    axes = [resolve(ctx.program.axes.of(source)[1]) for source in turn.via]
    return axes.index(own) + 1 if own in axes else 0


def _logits(ctx: Context, step: Rotate, stream: Node, heads: int, width: int) -> Node:
    """[B, T, H], float32 or wider: what exponents are computed from."""
    value = stream.meta["val"]
    made = {"dtype": torch.float64 if value.dtype == torch.float64 else torch.float32, "device": value.device}
    channels = int(value.shape[-1])
    weight = ctx.editor.parameter("weight", (heads, channels), lambda: torch.zeros(heads, channels, **made))
    start = start_of(float(step.base), width)
    bias = ctx.editor.parameter("bias", (heads,), lambda: torch.full((heads,), start, **made))
    wide = ctx.editor.call(aten.to.dtype, stream, made["dtype"])
    wide.meta[WHOLE] = True
    return ctx.editor.call(aten.linear.default, wide, weight, bias)


def start_of(base: float, width: int) -> float:
    """The logit at which f = base^(-2/d): ln(exp(base^(2/d) - 1) - 1)."""
    return math.log(math.expm1(base ** (2 / width) - 1))


def _valid(ctx: Context, stream: Node) -> Node | None:
    if ctx.sites.phase == "prefill":
        return ctx.valid_mask(ctx.program.axes.of(stream)[1])
    padding = ctx.sites.padding
    if padding is None:
        return None
    count = ctx.editor.size(stream, 1)
    ahead = ctx.editor.arithmetic(lambda n: -n, count)
    last = ctx.editor.call(aten.slice.Tensor, padding, 1, ahead, _MAX)
    return ctx.editor.call(aten.ne.Scalar, last, 0)


def _start(ctx: Context, stream: Node, heads: int, pairs: int) -> Node:
    value = stream.meta["val"]
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    with ctx.program.fake_mode:
        like = torch.empty(value.shape[0], heads, pairs, dtype=dtype, device=value.device)
    return take(ctx.program, _NAME, like, "the phases of the last token before it")
