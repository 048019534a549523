"""Greedy generation from a prompt's file and a step's file, by ONNX Runtime and NumPy alone.

A runtime of any kind does the same: what the prompt's file returns as `present.N.key` and `present.N.value` goes into
the step's file as `past.N.key` and `past.N.value`, and what that one returns into the next step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def run(session: Any, inputs: Arrays) -> dict[str, np.ndarray]:
    """What a file returns, by name; it is given those of the inputs that it takes."""
    taken = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {k: v for k, v in inputs.items() if k in taken}), strict=True))


def positions(mask: np.ndarray) -> np.ndarray:
    """Positions of tokens, int64 [B, T], from the padding mask: real ones are counted from 0."""
    return np.maximum(mask.cumsum(1) - 1, 0)


def generate(prefill: Any, decode: Any, inputs: Arrays, tokens: int, end: int | None = None) -> np.ndarray:
    """Generate the likeliest tokens.

    Args:
        prefill, decode: sessions of ONNX Runtime for the two files; no step is taken if `tokens` is 1.
        inputs: of the prompt: `input_ids` and `attention_mask`, int64 [B, T], and what else the file takes.
        tokens: how many to generate.
        end: the token after which a row is over; it is then repeated.

    Returns:
        int64 [B, N], N at most `tokens`.
    """
    mask = inputs["attention_mask"]
    out = run(prefill, {"position_ids": positions(mask), **inputs})
    chosen: list[np.ndarray] = []
    while True:
        token = out["logits"][:, -1].argmax(-1)
        if end is not None and chosen:
            token = np.where(chosen[-1] == end, end, token)
        chosen.append(token)
        if len(chosen) == tokens or (end is not None and (token == end).all()):
            return np.stack(chosen, 1)
        mask = np.concatenate([mask, np.ones_like(mask[:, :1])], 1)
        step = {"input_ids": token[:, None], "attention_mask": mask, "position_ids": positions(mask)[:, -1:]}
        out = run(decode, {**step, **cache(out)})


def cache(out: Arrays) -> dict[str, np.ndarray]:
    """What one step returned as caches, as the next one takes it."""
    return {f"past{name.removeprefix('present')}": value for name, value in out.items() if name.startswith("present.")}


def session(path: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """A file, ready to run."""
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=list(providers))
