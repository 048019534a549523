"""The optional packages that an export needs."""

from __future__ import annotations

import importlib
from types import ModuleType

from tokcompile.errors import LowerError

NEEDED = ("onnx", "onnxscript")
"""To write a file; to run one, `onnxruntime`."""


def needs(*names: str) -> list[ModuleType]:
    """Import packages of the extra `export`.

    Raises:
        LowerError: one is not there; said before a model is captured, not after.
    """
    found = []
    for name in names:
        try:
            found.append(importlib.import_module(name))
        except ImportError as error:
            raise LowerError(
                f"an ONNX file needs {name}, which cannot be imported",
                found=str(error),
                remedy="pip install 'tokcompile[export]'",
            ) from error
    return found
