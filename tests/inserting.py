"""Rule files with one insertion, and the tokens that it brought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokcompile import Weights


def rule(folder: Path, **fields: Any) -> str:
    """The path of a rule that inserts tokens `t`; without `at` before the first block of a decoder."""
    given = {"name": "t", "at": "decoder.0.input", **fields}
    if given.get("content", "learned") == "learned":
        given.setdefault("std", 1.0)
    path = folder / "putting.yaml"
    path.write_text(f"rule: putting\nabout: Put tokens in.\nsteps:\n  - insert: {json.dumps(given)}\n")
    return str(path)


def tokens(weights: Weights) -> Tensor:
    """The one set of tokens that a rule brought."""
    (held,) = weights.state_dict().values()
    return held.detach().clone()


def drawn(count: int, width: int, seed: int = 1) -> Tensor:
    """Tokens to insert, [count, width]."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def held(rule: str, name: str, value: Tensor) -> Weights:
    """Weights that hold the tokens of a rule."""
    weights = Weights()
    weights.load_state_dict({f"{rule}.{name}": value})
    return weights
