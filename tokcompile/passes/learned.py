"""Learned parts that layers of rules are made of: weights, linear maps and norms."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from tokcompile.editing.edit import Editor

aten = torch.ops.aten
_EPS = 1e-5


class Learned:
    """Parameters of one layer, of the dtype and on the device of what it reads."""

    def __init__(self, editor: Editor, name: str, like: Node, std: float) -> None:
        """Prepare a layer.

        Args:
            name: what its parameters' names begin with.
            like: the value that it reads.
            std: standard deviation of weights at the start.
        """
        self.editor, self.name, self.std = editor, name, std
        self.value = like.meta["val"]
        self.size = 0

    def weight(self, part: str, shape: tuple[int, ...], fill: float | None = None) -> Node:
        """A parameter: drawn from a normal distribution, each with a seed of its own, or filled with a number."""
        self.size += math.prod(shape)
        seed = sum(ord(letter) * 31**i for i, letter in enumerate(f"{self.name}_{part}")) % 2**31

        def make() -> torch.Tensor:
            rng = torch.Generator().manual_seed(seed)
            made = torch.full(shape, fill) if fill is not None else torch.randn(shape, generator=rng) * self.std
            return made.to(device=self.value.device, dtype=self.value.dtype)

        return self.editor.parameter(f"{self.name}_{part}", shape, make)

    def linear(self, part: str, x: Node, width: int, *, bias: bool = False, fill: float | None = None) -> Node:
        """x W^T, and plus a bias that starts as zeros: [.., C] becomes [.., width]."""
        weight = self.weight(part, (width, int(x.meta["val"].shape[-1])), fill=fill)
        args = (self.weight(f"{part}_bias", (width,), fill=0.0),) if bias else ()
        return self.editor.call(aten.linear.default, x, weight, *args)

    def norm(self, kind: str, x: Node) -> Node:
        """The last dimension normalised: `layer` with weight and bias, `rms` with a weight, `none` not at all."""
        if kind == "none":
            return x
        width = int(x.meta["val"].shape[-1])
        weight = self.weight("norm", (width,), fill=1.0)
        if kind == "rms":
            return self.editor.call(aten.rms_norm.default, x, [width], weight, _EPS)
        bias = self.weight("norm_bias", (width,), fill=0.0)
        return self.editor.call(aten.layer_norm.default, x, [width], weight, bias, _EPS)
