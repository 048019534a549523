"""ONNX Runtime on the CPU, for tests that ask what a file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tokcompile.onnx_export.export import Exported
from tokcompile.onnx_export.extra import needs

onnx, onnxruntime = needs("onnx", "onnxruntime")


def session(path: Path) -> Any:
    """A file, ready to run."""
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(file: Exported, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What a file returns, by name; inputs that a rule leaves unread are none of its."""
    feed = {name: value.numpy() for name, value in inputs.items() if name in file.inputs}
    return dict(zip(file.outputs, session(file.path).run(None, feed), strict=True))
