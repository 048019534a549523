"""Give a rewritten graph to a target's compiler.

The `tokred::` operators carry their references as composite implementations: AOTAutograd, and so Inductor, sees the
ATen operators that they are made of and fuses across them. Where a Triton kernel is chosen (`choosekernels.py`),
Inductor sees that kernel.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

import tokcompile.kernels
from tokcompile.errors import LowerError, known
from tokcompile.lowering.choosekernels import Choice, choose_kernels, tag
from tokcompile.lowering.rowproducts import reduce_row_products


@functools.cache
def operators_tag() -> str:
    """Hash of the sources of all operators and of their kernels.

    PyTorch's compile caches know an operator by its name only: without this in their keys, code compiled with an older
    reference of an operator would be used after an upgrade.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(tokcompile.kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return f"tokred-{digest.hexdigest()[:16]}"


def _inductor(gm: GraphModule, example_inputs: Sequence[Any], choices: list[Choice]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    reduce_row_products(gm)
    choices += choose_kernels(gm)
    key = f"{torch.compiler.config.cache_key_tag}{operators_tag()}-{tag()}"
    with torch.compiler.config.patch(cache_key_tag=key):
        return compile_fx(gm, list(example_inputs))


def _aot_eager(gm: GraphModule, example_inputs: Sequence[Any], choices: list[Choice]) -> Callable[..., Any]:
    from torch._dynamo.backends.debugging import aot_eager

    del choices
    return aot_eager(gm, list(example_inputs))


def _eager(gm: GraphModule, example_inputs: Sequence[Any], choices: list[Choice]) -> Callable[..., Any]:
    del example_inputs, choices
    return gm.forward


def _brought(package: str, module: str, backend: str) -> Callable[[GraphModule, Sequence[Any], list[Choice]], Any]:
    """A compiler of another package, which registers a backend of torch.compile when it is imported."""

    def compiled(gm: GraphModule, example_inputs: Sequence[Any], choices: list[Choice]) -> Callable[..., Any]:
        del choices
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise LowerError(
                f"a target needs {module}, which cannot be imported",
                found=str(error),
                remedy=f"pip install {package}, or another target: {', '.join(name for name in TARGETS)}",
            ) from error
        return torch._dynamo.lookup_backend(backend)(gm, list(example_inputs))

    return compiled


TARGETS: dict[str, Callable[[GraphModule, Sequence[Any], list[Choice]], Callable[..., Any]]] = {
    "inductor": _inductor,
    "aot_eager": _aot_eager,
    "eager": _eager,
    "tensorrt": _brought("torch-tensorrt", "torch_tensorrt", "torch_tensorrt"),
}


def lower(
    gm: GraphModule, example_inputs: Sequence[Any], target: str, choices: list[Choice] | None = None
) -> Callable[..., Any]:
    """Compile a rewritten graph.

    Args:
        gm: the rewritten graph module.
        example_inputs: what Dynamo handed over beside the graph.
        target: `inductor`, `aot_eager` or `eager`; `tensorrt` where torch_tensorrt is installed. Kernels are chosen for
            Inductor alone; the others run references.
        choices: gets what was chosen for each `tokred::` operator.

    Raises:
        LowerError: the target is not known, or its package cannot be imported; a setting of kernels is wrong.
    """
    if target not in TARGETS:
        raise LowerError(f"unknown target '{target}'", remedy=known(target, TARGETS))
    return TARGETS[target](gm, example_inputs, [] if choices is None else choices)
