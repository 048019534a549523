"""What lets Dynamo see a whole Hugging Face model as one graph."""

from __future__ import annotations

import importlib

import torch

_FLAGS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
_defaults = {name: getattr(torch._dynamo.config, name) for name in _FLAGS}


def prepare() -> None:
    """Set Dynamo's capture flags (unless the user did) and let transformers' hook installer run while tracing.

    Without the flags, a scalar read or a data-dependent shape splits the graph. Without the second step the first call
    of a transformers model splits it too: it installs output-capturing hooks under a lock, which Dynamo cannot trace;
    marked as a constant call, it runs at trace time.
    """
    for name in _FLAGS:
        if getattr(torch._dynamo.config, name) == _defaults[name]:
            setattr(torch._dynamo.config, name, True)
    module = _optional("transformers.utils.output_capturing")
    installer = getattr(module, "maybe_install_capturing_hooks", None)
    if installer is not None and not getattr(installer, "_dynamo_marked_constant", False):
        torch.compiler.assume_constant_result(installer)


def _optional(name: str) -> object | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
