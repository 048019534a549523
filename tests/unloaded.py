"""torchvision beside a torch that it was not built for, as a CPU build of torch beside a CUDA build of torchvision.

Its library of operators then cannot be loaded. torchvision allows for that, but for two operators whose shapes it
describes without asking: its import fails, and with it that of timm and of most classes of transformers.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import import_module

import torch

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
"""What torchvision describes without asking whether its operators are there."""


@cache
def declare_operators() -> torch.library.Library | None:
    """Make torchvision importable where its operators are missing: declare them; to call one is an error as before.

    Returns:
        The declarations, which hold as long as this object lives; None where they are not needed.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    else:
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    return library


@cache
def missing(module: str) -> str:
    """Why a module cannot be imported; empty when it can, or where none is needed."""
    try:
        if module:
            import_module(module)
    except (ImportError, RuntimeError) as error:
        return f"needs {module}: {error}"
    return ""
