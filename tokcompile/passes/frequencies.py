"""rotate, by base: other frequencies, from another base or stretched for longer texts."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from tokcompile.editing.edit import Editor
from tokcompile.editing.positions import recompute
from tokcompile.errors import RuleError
from tokcompile.passes.context import Context
from tokcompile.sites.turns import Frequencies
from tokcompile.steps import Rotate

aten = torch.ops.aten
_WAVES = {aten.cos.default, aten.sin.default}
FAST, SLOW = 32, 1
"""Turns over the trained length above which YaRN keeps a frequency, and below which it stretches it by the factor."""


def rotate_base(ctx: Context, step: Rotate, found: list[Frequencies], record: dict[str, object]) -> None:
    """Compute tables again with frequencies base^(-2i/d), stretched as the step says.

    `linear` divides them by the factor (Chen et al. 2023, arXiv 2306.15595); `ntk` raises the base to
    base * factor^(d/(d-2)); `yarn` stretches slow ones alone and makes tables stronger (Peng et al. 2023, arXiv
    2309.00071, sections 3.2 and 3.4). A stretch that the model has of its own is replaced, its strength too.
    """
    base, factor = float(step.base), float(step.factor)
    record |= {"base": base, "scaling": step.scaling}
    strength = 0.1 * math.log(factor) + 1 if step.scaling == "yarn" and factor > 1 else 1.0
    for each in found:
        old = _operand(each)
        with ctx.editor.before(each.angles):
            inverse = _stretched(ctx.editor, each, base, factor, step)
            made = inverse if old is each.inverse else recompute(ctx.editor, old, each.inverse, {each.inverse: inverse})
            ctx.editor.swap_input(each.angles, old, made)
        own = each.turns[0].scale
        if not math.isclose(own, strength, rel_tol=1e-9):
            _strengthen(ctx, each, strength / own)


def _operand(frequencies: Frequencies) -> Node:
    """The factor of the angles that is a view of the frequencies."""
    above = {frequencies.inverse}
    todo = [frequencies.inverse]
    while todo:
        for user in todo.pop().users:
            if user not in above and user is not frequencies.angles:
                above.add(user)
                todo.append(user)
    return next(arg for arg in frequencies.angles.args if arg in above)


def _strengthen(ctx: Context, frequencies: Frequencies, by: float) -> None:
    """Multiply all cosines and sines of some angles."""
    reach = ctx.sites.reach
    above = reach.ancestors({turn.table for turn in frequencies.turns})
    waves = [n for n in above if n.target in _WAVES and reach.above(frequencies.angles, n)]
    for node in sorted(waves, key=reach.order.__getitem__):
        users = list(node.users)
        with ctx.editor.after([node]):
            more = ctx.editor.call(aten.mul.Tensor, node, by)
        for user in users:
            ctx.editor.swap_input(user, node, more)


def _powers(editor: Editor, base: float, pairs: int, like: torch.Tensor) -> Node:
    """base^(-2i/d) for i = 0 .. pairs - 1, in the order of operations that transformers has."""
    index = editor.call(aten.arange.start_step, 0, 2 * pairs, 2, device=like.device)
    share = editor.call(aten.div.Tensor, editor.call(aten.to.dtype, index, like.dtype), float(2 * pairs))
    return editor.call(aten.reciprocal.default, editor.call(aten.pow.Scalar, base, share))


def _stretched(editor: Editor, frequencies: Frequencies, base: float, factor: float, step: Rotate) -> Node:
    pairs, like = frequencies.pairs, frequencies.angles.meta["val"]
    if step.scaling == "ntk":
        if pairs < 2:
            raise RuleError("'scaling: ntk' needs more than one frequency", where=[step.at])
        return _powers(editor, base * factor ** (2 * pairs / (2 * pairs - 2)), pairs, like)
    own = _powers(editor, base, pairs, like)
    if step.scaling == "none" or factor == 1:
        return own
    slow = editor.call(aten.div.Tensor, own, factor)
    if step.scaling == "linear":
        return slow
    low, high = correction_range(base, 2 * pairs, int(step.trained))
    index = editor.call(aten.arange.default, pairs, device=like.device, dtype=like.dtype)
    ramp = editor.call(aten.div.Tensor, editor.call(aten.sub.Tensor, index, float(low)), float(high - low))
    ramp = editor.call(aten.clamp.default, ramp, 0, 1)
    kept = editor.call(aten.mul.Tensor, own, editor.call(aten.rsub.Scalar, ramp, 1.0))
    return editor.call(aten.add.Tensor, editor.call(aten.mul.Tensor, slow, ramp), kept)


def correction_range(base: float, width: int, trained: int) -> tuple[float, float]:
    """The frequencies between which YaRN goes from keeping to stretching: section 3.2, with whole ends."""

    def dim(turns: float) -> float:
        return width * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dim(FAST)), 0), min(math.ceil(dim(SLOW)), width - 1)
    return low, high if high > low else low + 0.001
