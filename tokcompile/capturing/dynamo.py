"""What lets Dynamo see a whole Hugging Face model as one graph."""

from __future__ import annotations

import functools
import gc
import importlib
import math
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from tokcompile.capturing import oldertorch

_FLAGS = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")
_defaults = {name: getattr(torch._dynamo.config, name) for name in _FLAGS}
_CONSTANT_CALLS_TAKE_MODULES = "2.13"  # torch.__version__ compares as a version
_HOOKED = "_output_capturing_hooks_installed"
_LINKS = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable", "compiler_fn", "_inner_convert")


def prepare() -> None:
    """Set Dynamo's capture flags (unless the user did) and let transformers be traced whole.

    Without the flags, a scalar read or a data-dependent shape splits the graph. The first call of a transformers model
    splits it too: it installs output-capturing hooks under a lock, which Dynamo cannot trace; marked as a constant
    call, that runs at trace time.
    """
    for name in _FLAGS:
        if getattr(torch._dynamo.config, name) == _defaults[name]:
            setattr(torch._dynamo.config, name, True)
    _install_hooks_while_tracing()
    _keep_vision_in_forward()
    _count_sizes_as_numbers()
    oldertorch.mend()
    _copy_configurations()


def without_flags() -> AbstractContextManager[None]:
    """Dynamo's capture flags as PyTorch has them, for a model that is compiled without a rule beside one with.

    With the flags, PyTorch traces a read of a tensor's values where it would split the graph, and may then fail.
    """
    return torch._dynamo.config.patch(_defaults)


def _install_hooks_while_tracing() -> None:
    module = optional("transformers.utils.output_capturing")
    installer = getattr(module, "maybe_install_capturing_hooks", None)
    if installer is None:
        return
    if torch.__version__ >= _CONSTANT_CALLS_TAKE_MODULES:
        torch.compiler.assume_constant_result(installer)
        return
    # The same versions fail in Dynamo on transformers' checks of tensor counts; this is transformers' switch for them.
    os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    _call_before_tracing(torch._dynamo.callback_handler)


def _call_before_tracing(handler: Any) -> None:
    """Register the callback, also with the list that `torch._dynamo.reset()` leaves empty."""
    if _install_hooks_before_tracing in handler.start_callbacks:
        return
    handler.register_start_callback(_install_hooks_before_tracing)
    clear = handler.clear

    def clear_and_register() -> None:
        clear()
        handler.register_start_callback(_install_hooks_before_tracing)

    handler.clear = clear_and_register


def _install_hooks_before_tracing(*args: Any) -> None:
    """Older PyTorch makes no constant of a call with a module: give models their hooks when tracing starts.

    As transformers does at a first call: from the outermost model that records anything on down. Hooks that are there
    already stay the only ones: twice the hooks would record every hidden state twice.
    """
    del args
    install_hooks(gc.get_objects())


def install_hooks(objects: Iterable[Any]) -> None:
    """Give the transformers models among some objects the hooks that their first call would give them."""
    base = getattr(optional("transformers"), "PreTrainedModel", None)
    module: Any = optional("transformers.utils.output_capturing")
    if base is None or module is None:
        return
    recorded = getattr(module, "_CAN_RECORD_REGISTRY", {})
    models = [m for m in objects if issubclass(type(m), base) and _installs_hooks(m)]
    for model in sorted(models, key=lambda m: -sum(1 for _ in m.modules())):  # outer ones first
        if not any(getattr(part, _HOOKED, False) for part in model.modules()):
            module.maybe_install_capturing_hooks(model)
        elif not recorded.get(str(type(model))):  # it records nothing by itself, and its parts have their hooks
            setattr(model, _HOOKED, True)


def _installs_hooks(model: torch.nn.Module) -> bool:
    """Whether a model's forward is one that installs hooks when it is called."""
    call: Any = type(model).forward
    while call is not None:
        code = getattr(call, "__code__", None)
        if code is not None and code.co_filename.endswith("output_capturing.py"):
            return True
        call = getattr(call, "__wrapped__", None)
    return False


def _copy_configurations() -> None:
    """Let older PyTorch trace the copies that models of an encoder and a decoder make of their configuration."""
    base = getattr(optional("transformers"), "PreTrainedConfig", None)
    if base is not None and torch.__version__ < oldertorch.NEW_ENOUGH:
        from tokcompile.capturing import oldercopies  # of parts of Dynamo that newer versions need not have

        oldercopies.copy_while_tracing(base)


def know_caches(model: torch.nn.Module) -> None:
    """Make DynamicCache known to torch.export, as transformers itself does, where a model is of transformers."""
    base = getattr(optional("transformers"), "PreTrainedModel", None)
    register = getattr(optional("transformers.integrations.executorch"), "register_dynamic_cache_export_support", None)
    if base is not None and register is not None and isinstance(model, base):
        register()


def _count_sizes_as_numbers() -> None:
    """Let Dynamo take the product of a tensor's sizes by NumPy for the number that it is.

    It makes a tensor of it, and a branch on that, as where a model checks the number of its crops, splits the graph.
    """
    module: Any = optional("torch._dynamo.variables.misc")
    numpy: Any = optional("numpy")
    numpy_variable = getattr(module, "NumpyVariable", None)
    call = getattr(numpy_variable, "call_function", None)
    if numpy is None or call is None or getattr(call, "_tokcompile", False):
        return

    @functools.wraps(call)
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        sizes = _numbers(args[0]) if self.value is numpy.prod and len(args) == 1 and not kwargs else None
        if sizes is None:
            return call(self, tx, args, kwargs)
        return module.ConstantVariable.create(math.prod(sizes))

    call_function._tokcompile = True  # type: ignore[attr-defined]
    numpy_variable.call_function = call_function


def _numbers(variable: Any) -> tuple[int, ...] | None:
    """A sequence of numbers that Dynamo knows; None for anything else."""
    try:
        found = variable.as_python_constant()
    except NotImplementedError:
        return None
    numbers = isinstance(found, (tuple, list)) and all(type(n) is int for n in found)
    return tuple(found) if numbers else None


def _keep_vision_in_forward() -> None:
    """Let `generate` leave the image to `forward` in models that this backend compiles.

    transformers 5.2x encodes images before `forward` when a model takes ready features, outside of what
    `model.compile` compiles: a rule that reads vision attention would find no vision stack. Other models, and other
    backends, are left as they are.
    """
    module = optional("transformers.generation.utils")
    mixin = getattr(module, "GenerationMixin", None)
    ask = getattr(mixin, "_supports_mm_encoder_outputs", None)
    if ask is None or getattr(ask, "_tokcompile", False):
        return

    @functools.wraps(ask)
    def supports(self: Any) -> bool:
        return ask(self) and not compiled_here(self)

    supports._tokcompile = True  # type: ignore[attr-defined]
    mixin._supports_mm_encoder_outputs = supports


def compiled_here(model: torch.nn.Module) -> bool:
    """Whether `model.compile(backend="tokred")` was called on a model."""
    call = getattr(model, "_compiled_call_impl", None)
    call = getattr(call, "compiled", call)  # tokcompile.compile prepares the inputs of some models before it
    code, cells = getattr(call, "__code__", None), getattr(call, "__closure__", None) or ()
    names = code.co_freevars if code is not None else ()
    found = dict(zip(names, (c.cell_contents for c in cells), strict=False))
    link = found.get("callback")
    while link is not None:
        if getattr(link, "__module__", "") == "tokcompile.backend":
            return True
        link = next((getattr(link, name) for name in _LINKS if hasattr(link, name)), None)
    return False


def optional(name: str) -> object | None:
    """A module, where it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
