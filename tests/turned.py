"""A language model run by hand with other rotary tables: its own forward, and nothing of tokcompile.

The module that makes tables is given other angles, and what turns queries and keys takes tables with a dimension for
heads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

Angles = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of embeddings [B, T, C], positions [B, T] and frequencies [P], angles [B or 1, G, T, P]."""


def text_of(model: nn.Module) -> nn.Module:
    """The module that holds the decoder's layers."""
    return getattr(model.model, "language_model", model.model)


@contextmanager
def turned(model: nn.Module, angles: Angles, strength: float = 1.0) -> Iterator[None]:
    """Let a Llama-like model turn queries and keys by other angles; heads of a group share those of their key head."""
    text = text_of(model)
    module = importlib.import_module(type(text.layers[0].self_attn).__module__)
    apply = module.apply_rotary_pos_emb

    def tables(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = angles(x, position_ids, text.rotary_emb.inv_freq)
        whole = torch.cat([half, half], -1)
        return (whole.cos() * strength).to(x.dtype), (whole.sin() * strength).to(x.dtype)

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        def one(x: Tensor) -> Tensor:
            c, s = (t.repeat_interleave(x.shape[1] // t.shape[1], 1) for t in (cos, sin))
            return x * c + module.rotate_half(x) * s

        return one(q), one(k)

    text.rotary_emb.forward, module.apply_rotary_pos_emb = tables, turn
    try:
        yield
    finally:
        del text.rotary_emb.forward  # the class's own again, which compiled code is guarded by
        module.apply_rotary_pos_emb = apply


def at(positions: list[list[Any]]) -> Angles:
    """Angles of positions that are given for each row, exact numbers."""

    def make(x: Tensor, position_ids: Tensor, inverse: Tensor) -> Tensor:
        del x, position_ids
        table = torch.tensor([[float(p) for p in row] for row in positions])
        return (table[..., None] * inverse.float())[:, None]

    return make


def variable(images: list[list[bool]], delta: list[Fraction], start: list[int] | None = None) -> list[list[Fraction]]:
    """Positions by V2PE's description, token by token: an image's tokens by its delta, then the next whole number.

    Args:
        images: for each row whether each token is an image's; images stand apart.
        delta: of each image of a row; the last one is that of all that follow.
        start: the position of each row's first token, 0 by default.
    """
    out = []
    for number, row in enumerate(images):
        position, count, done = Fraction(start[number] if start else 0) - 1, -1, []
        for token, image in enumerate(row):
            if image and not (token and row[token - 1]):
                count += 1
            if image:
                position += delta[min(count, len(delta) - 1)]
            else:
                position = Fraction(-((-position) // 1)) + 1
            done.append(position)
        out.append(done)
    return out


def content(weight: Tensor, bias: Tensor, valid: Tensor, first: int = 0) -> Angles:
    """Angles by CARoPE's description, in float64 loops over tokens and powers."""

    def make(x: Tensor, position_ids: Tensor, inverse: Tensor) -> Tensor:
        z = x.double() @ weight.double().T + bias.double()
        f = 1 / (torch.log(1 + torch.exp(z)) + 1)
        batch, tokens, heads = z.shape
        out = torch.zeros(batch, heads, tokens, len(inverse), dtype=torch.float64)
        for i in range(len(inverse)):
            total = torch.zeros(batch, heads, dtype=torch.float64)
            for t in range(tokens):
                total = total + f[:, t] ** (i + first) * valid[:, t : t + 1].double()
                out[:, :, t, i] = total
        return out.float()

    return make
