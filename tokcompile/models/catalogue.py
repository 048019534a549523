"""The catalogue of families: small models with random weights, from the classes of transformers and timm, as data.

    family("qwen3_moe").build()

A family is one line of `data/*.yaml`. What a line leaves out comes from the `defaults` of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tokcompile.errors import TokredError, known
from tokcompile.models.families import scaled_init
from tokcompile.models.inputs import text

DATA = Path(__file__).parent / "data"
INPUTS: dict[str, Callable[..., dict[str, Tensor]]] = {"text": text.text}
"""Makers of example inputs, by the name that a family gives as `inputs`."""


class Family(BaseModel):
    """One family.

    Attributes:
        name: its line's name, which is transformers' model type unless `type` says otherwise.
        kind: which stacks it has.
        auto: the class of transformers that makes the model from a configuration.
        inputs: which of `INPUTS` makes its example inputs.
        config: of the configuration; a mapping inside is a configuration inside.
        options: further arguments of the maker of inputs.
        needs: the package that it needs beside transformers.
        about: what is special about it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["decoder", "vlm", "vision", "encoder", "encoder-decoder", "diffusion"]
    auto: str
    inputs: str
    type: str = ""
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    needs: str = ""
    about: str = ""

    def build(self, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The model with random weights, in eval mode."""
        transformers = import_module("transformers")
        config = transformers.AutoConfig.for_model(self.type or self.name, **self.config)
        maker = getattr(transformers, self.auto)
        model = maker.from_config(config) if self.auto.startswith("Auto") else maker(config)
        return scaled_init(model, seed).eval().to(dtype)

    def example(
        self, model: nn.Module, batch: int = 1, padded: bool = False, length: int = 17, seed: int = 0
    ) -> dict[str, Tensor]:
        """Arguments of the model's forward, the same for the same seed.

        Args:
            model: what `build` returned.
            batch: rows.
            padded: rows of a text have different lengths, padded on the left.
            length: tokens of text.
            seed: of the random tokens and pixels.
        """
        return INPUTS[self.inputs](model, batch=batch, padded=padded, length=length, seed=seed, **self.options)


@cache
def families() -> dict[str, Family]:
    """Every family of the catalogue, by name."""
    found: dict[str, Family] = {}
    for path in sorted(DATA.glob("*.yaml")):
        data = yaml.safe_load(path.read_text())
        for name, line in data["families"].items():
            found[name] = Family(name=name, **_merged(data["defaults"], line or {}))
    return found


def _merged(defaults: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    out = {**defaults, **line}
    for key in ("config", "options"):
        out[key] = {**defaults.get(key, {}), **line.get(key, {})}
    return out


def family(name: str) -> Family:
    """One family.

    Raises:
        TokredError: there is none of that name; the error lists those there are.
    """
    if name not in families():
        raise TokredError(f"the catalogue has no family '{name}'", remedy=known(name, families()))
    return families()[name]
