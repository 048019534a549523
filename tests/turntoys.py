"""One attention on a residual stream, with rotary tables applied in each way that models have; and the same by hand.

Sizes are small and all different: 2 rows, 6 tokens, 4 heads of 2 key heads, 24 channels a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from graphs import traced
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from tokcompile.editing.edit import Editor
from tokcompile.passes import PASSES, Context
from tokcompile.program import Program
from tokcompile.sites import find_sites
from tokcompile.steps import STEPS

ROWS, TOKENS, HEADS, KEY_HEADS, WIDTH = 2, 6, 4, 2, 24
CHANNELS = HEADS * WIDTH
SECTIONS = (4, 4, 4)


def _half(x: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


def _pairs(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def _apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def _partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + _half(turned) * sin, rest], -1)


def _repeated(angles: Tensor) -> Tensor:
    return angles.repeat_interleave(2, -1)


def _twice(angles: Tensor) -> Tensor:
    return torch.cat([angles, angles], -1)


def _sections(angles: Tensor) -> Tensor:
    parts = angles.split_with_sizes(SECTIONS, -1)
    return _twice(torch.cat([part[axis] for axis, part in enumerate(parts)], -1))


def _woven(angles: Tensor) -> Tensor:
    """Coordinates in turn, written in place: 0 1 2 0 1 2 ..."""
    first = angles[0].clone()
    for axis in (1, 2):
        first[..., axis::3] = angles[axis, ..., axis::3]
    return _twice(first)


def _whole(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _half(x) * sin


def _woven_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + _pairs(x) * sin


LAYOUTS: dict[str, tuple[int, Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "half": (12, _twice, _whole),
    "pairs": (12, _repeated, _woven_pairs),
    "apart": (12, lambda angles: angles, _apart),
    "partial": (6, _twice, _partial),
    "sections": (12, _sections, _whole),
    "woven": (12, _woven, _whole),
}
"""How many frequencies there are, how angles become tables, and how tables turn queries and keys."""
AXIS = {"sections": [0] * 4 + [1] * 4 + [2] * 4, "woven": [0, 1, 2] * 4}
"""The coordinate of each frequency, where there are several."""


def inputs(layout: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stream [B, T, C], positions [B, T] or [3, B, T], frequencies [P], and weights of queries, keys and values."""
    rng = torch.Generator().manual_seed(3)
    coordinates = (3,) if layout in AXIS else ()
    positions = torch.randint(0, 40, (*coordinates, ROWS, TOKENS), generator=rng)
    pairs = LAYOUTS[layout][0]
    inverse = 100.0 ** (-torch.arange(pairs) / pairs)
    weight = torch.randn((HEADS + 2 * KEY_HEADS) * WIDTH, CHANNELS, generator=rng) / 8
    x = torch.randn(ROWS, TOKENS, CHANNELS, generator=rng)
    return x.to(dtype), positions, inverse.to(dtype), weight.to(dtype)


def model(layout: str, products: bool = False) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The model of a layout; `products` for angles that are a matrix product, as older models have."""

    def run(x: Tensor, positions: Tensor, inverse: Tensor, weight: Tensor) -> Tensor:
        if products:
            column = inverse[None, :, None].expand(positions.shape[0], -1, 1)
            angles = (column @ positions[:, None].to(inverse.dtype)).transpose(1, 2)
        else:
            angles = positions.unsqueeze(-1).to(inverse.dtype) * inverse
        table = LAYOUTS[layout][1](angles)
        return by_tables(layout, x, table.cos().unsqueeze(1), table.sin().unsqueeze(1), weight)

    return run


def by_tables(layout: str, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same given tables [B, H or Hkv or 1, T, W]; heads of a group share those of their key head."""
    turn = LAYOUTS[layout][2]
    q, k, v = queries_and_keys(x, weight)
    q, k = (
        turn(
            t, *(table if table.shape[1] in (1, t.shape[1]) else table.repeat_interleave(2, 1) for table in (cos, sin))
        )
        for t in (q, k)
    )
    return added(x, scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True))


def with_sinks(x: Tensor, positions: Tensor, inverse: Tensor, weight: Tensor, sinks: Tensor) -> Tensor:
    """The layout `half` with attention that is written out: sinks [H] take a share of it, and are cut off again."""
    table = _twice(positions.unsqueeze(-1).to(inverse.dtype) * inverse).unsqueeze(1)
    q, k, v = queries_and_keys(x, weight)
    q, k = (_whole(t, table.cos(), table.sin()) for t in (q, k))
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, 1) for t in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * WIDTH**-0.5
    scores = scores + torch.full((TOKENS, TOKENS), -torch.inf).triu(1)
    both = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(ROWS, -1, TOKENS, -1)], -1)
    both = both - both.max(-1, keepdim=True).values
    return added(x, torch.matmul(both.softmax(-1)[..., :-1], v))


def two_kinds(x: Tensor, positions: Tensor, inverse: Tensor, weight: Tensor, late: Tensor) -> Tensor:
    """Two layers of the layout `half`, each with frequencies of its own; tables of the second are computed first."""
    tables = [_twice(positions.unsqueeze(-1).to(x.dtype) * each).unsqueeze(1) for each in (late, inverse)]
    for table in reversed(tables):
        x = by_tables("half", x, table.cos(), table.sin(), weight)
    return x


def queries_and_keys(x: Tensor, weight: Tensor) -> list[Tensor]:
    """Queries, keys and values [B, H, T, D]."""
    parts = linear(x, weight).unflatten(-1, (-1, WIDTH)).split([HEADS, KEY_HEADS, KEY_HEADS], 2)
    return [part.transpose(1, 2) for part in parts]


def added(x: Tensor, out: Tensor) -> Tensor:
    """What attention gives, back on the stream."""
    return x + out.transpose(1, 2).flatten(2)


def by_angles(layout: str, x: Tensor, angles: Tensor, weight: Tensor, strength: float = 1.0) -> Tensor:
    """The same given angles [B, G, T, P] that each frequency turns by, and how strong tables are."""
    one = {"pairs": _repeated, "apart": lambda a: a}.get(layout, _twice)
    return by_tables(layout, x, one(angles).cos() * strength, one(angles).sin() * strength, weight)


def captured(layout: str, products: bool = False, dtype: torch.dtype = torch.float32) -> Program:
    """The model of a layout as a program."""
    return traced(model(layout, products), *inputs(layout, dtype))


def context(program: Program) -> Context:
    """What passes need to edit a program for a rule named `mine`."""
    return Context(program, Editor(program, "mine"), find_sites(program), None, counts=Counter())


def edit(program: Program, verb: str, **fields: Any) -> Context:
    """Carry one step out."""
    ctx = context(program)
    PASSES[verb](ctx, STEPS[verb].model_validate(fields))
    program.gm.recompile()
    return ctx
