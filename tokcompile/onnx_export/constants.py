"""Constants in ONNX forms of operators.

Imports onnxscript: see `extra.needs`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op


def constant(value: Any, dtype: Any) -> Any:
    """A constant of a NumPy dtype, of the shape that NumPy gives the value."""
    return op.Constant(value=ir.tensor(np.array(value, dtype=dtype)))
