"""A second attention of some tokens among themselves, by its description: dense, masked, in loops of plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import longer
import torch
import torch.nn.functional as F
from torch import Tensor

from tokcompile import Weights

PARTS = ("query", "key", "value", "output")


def normed(x: Tensor, held: Mapping[str, Tensor]) -> Tensor:
    """The learned norm: by mean and variance where there is a bias, by the root mean square with a weight alone."""
    width = (x.shape[-1],)
    if "norm_bias" in held:
        return F.layer_norm(x, width, held["norm"], held["norm_bias"])
    return F.rms_norm(x, width, held["norm"], 1e-5) if "norm" in held else x


def attend(
    h: Tensor, flags: Tensor, held: Mapping[str, Tensor], heads: int, turn: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """h plus what flagged tokens give that see flagged ones up to themselves; all others plus nothing.

    Args:
        h: [B, T, C].
        flags: bool [B, T].
        held: the layer's parameters by part.
        turn: turns queries and keys [B, H, T, D] of all tokens.
    """
    x = normed(h, held)
    q, k, v = (F.linear(x, held[part]).unflatten(-1, (heads, -1)).transpose(1, 2) for part in PARTS[:3])
    q, k = turn(q), turn(k)
    scores = (q @ k.transpose(-1, -2)).double() * q.shape[-1] ** -0.5
    out = h.clone()
    for row in range(len(h)):
        for i in range(h.shape[1]):
            seen = [j for j in range(i + 1) if flags[row, j]]
            if flags[row, i]:
                shares = scores[row, :, i, seen].softmax(-1).to(v.dtype)
                given = (shares[:, None] @ v[row][:, seen]).flatten()
                out[row, i] = h[row, i] + F.linear(given, held["output"])
    return out


def parts(weights: Weights, rule: str, layer: str, block: int) -> dict[str, Tensor]:
    """The parameters of one block's layer, by part."""
    start = f"{rule}.{layer}_{block}_"
    return {name.removeprefix(start): v for name, v in weights.state_dict().items() if name.startswith(start)}


def train(weights: Weights, seed: int = 7) -> None:
    """Give every parameter of rules other numbers, those that start as zeros too."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in weights.parameters():
        scale = 0.2 if parameter.ndim > 1 else 0.1
        parameter.data += (torch.randn(parameter.shape, generator=rng) * scale).to(parameter.dtype)


def middle(weights: Weights, heads: int, name: str = "layered", layer: str = "own") -> longer.Middle:
    """The layers of a rule by hand, after a block's own attention; a block without parameters has none."""

    def run(block: int, x: Tensor, flags: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        held = parts(weights, name, layer, block)
        cos, sin = (t[:, None] for t in tables)

        def turn(q: Tensor) -> Tensor:
            one, two = q.chunk(2, -1)
            return q * cos + torch.cat([-two, one], -1) * sin

        return attend(x, flags, held, heads, turn) if held else x

    return run
