"""The `tokred::` operator library: how each file of this folder registers its op.

An op has one implementation, its reference in plain torch ops, registered as CompositeImplicitAutograd. So eager, fake
tensors, symbolic shapes, autograd and Inductor all follow from the reference, while a pre-dispatch trace and
torch.export keep the op as one node `torch.ops.tokred.NAME.default`. An op that loops as often as a budget is large
would be unrolled by a compiler: it says its shape by a function of its own, stays one node to the end, and the
compiled graph calls its reference.

An op may have a Triton kernel beside its reference, in a module that is imported only when it is asked for: `kernel_op`
gives it as `torch.ops.tokred_triton.NAME.default`, with the same arguments and results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch

from . import _triton

NAMESPACE = "tokred"

# A reload of this module runs in the same globals: the library and its table have to survive it, because dropping a
# Library unregisters its ops and leaves dangling nodes in the graphs that were captured before.
_library: torch.library.Library = globals().get("_library") or torch.library.Library(NAMESPACE, "FRAGMENT")
_references: dict[str, Callable[..., torch.Tensor]] = globals().get("_references") or {}
_schemas: dict[str, str] = globals().get("_schemas") or {}
# Of ops that no compiler looks into: their results under fake tensors.
_fakes: dict[str, Callable[..., torch.Tensor]] = globals().get("_fakes") or {}
# By the name of an op: the module of its Triton kernel, and what `kernel_op` made of it.
_parts: dict[str, str] = globals().get("_parts") or {}
_kernels: dict[str, _triton.Kernel] = globals().get("_kernels") or {}


def define(
    schema: str,
    reference: Callable[..., torch.Tensor],
    *,
    triton: str = "",
    fake: Callable[..., torch.Tensor] | None = None,
) -> Any:
    """Register `tokred::NAME` with `reference` as its implementation and return its OpOverload.

    Args:
        schema: ATen schema without the namespace, e.g. `"last_valid(Tensor padding_mask) -> Tensor"`.
        reference: plain torch ops; no data-dependent shapes, no `.item()`, no in-place change of an argument.
        triton: the module of its Triton kernel: a name in this folder, or a whole one with dots; see `_triton`.
        fake: for an op that no compiler may look into, and that has no gradients: its result under fake tensors.

    Defining a name again with the same schema (a module reload) swaps the reference and keeps the op.

    Raises:
        ValueError: the name is taken with another schema.
    """
    name = schema.partition("(")[0].strip()
    known = _schemas.get(name)
    if known is not None and known != schema:
        raise ValueError(f"tokred::{name} is already defined as `{known}`; a new schema needs a new process")
    _references[name] = reference
    if fake is not None:
        _fakes[name] = fake
    if known is None:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        key = "CompositeImplicitAutograd" if fake is None else "CompositeExplicitAutograd"
        _library.impl(name, lambda *args, **kwargs: _references[name](*args, **kwargs), key)
        if fake is not None:
            torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: _fakes[name](*args), lib=_library)
        _schemas[name] = schema
    if triton:
        _parts[name] = triton
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def reference_of(name: str) -> Callable[..., torch.Tensor]:
    """The reference implementation of `tokred::name`. Raises KeyError, naming the known ops, when there is none."""
    if name not in _references:
        raise KeyError(f"no op tokred::{name}; known: {', '.join(names())}")
    return _references[name]


def names() -> tuple[str, ...]:
    """All registered ops, sorted."""
    return tuple(sorted(name for name in _references if not name.startswith(_HIDDEN)))


def define_kernel(schema: str, reference: Callable[..., Any], *, triton: str) -> None:
    """Bring a kernel that stands for several ops at once, which no pass inserts: it has no `tokred::` op.

    Arguments as for `define`.
    """
    name = schema.partition("(")[0].strip()
    _references[_hidden(name)], _schemas[_hidden(name)], _parts[_hidden(name)] = reference, schema, triton


def kernel_names() -> tuple[str, ...]:
    """The ops that have a Triton kernel, sorted. Triton need not be installed."""
    return tuple(sorted(name for name in _parts if name in _schemas and not name.startswith(_HIDDEN)))


def joint_names() -> tuple[str, ...]:
    """The kernels that stand for several ops at once, sorted."""
    return tuple(sorted(name.removeprefix(_HIDDEN) for name in _parts if name.startswith(_HIDDEN)))


def kernel_fault(name: str, args: Sequence[Any]) -> str | None:
    """Why the kernel of an op cannot run on these arguments, real or fake ones; None when it can."""
    missing = _triton.missing()
    return missing or _part(name).supports(*args)


def kernel_op(name: str) -> Any:
    """The OpOverload of `tokred_triton::name`, registered at the first call.

    Raises:
        KeyError: there is no such kernel. ImportError: Triton is not installed.
    """
    key = _key(name)
    if key not in _kernels:
        # By the name, and not the function: a reload swaps references.
        own = lambda *args: _references[key](*args)  # noqa: E731
        shape = _fakes.get(key, own)
        _kernels[key] = _triton.register(_schemas[key], own, _part(name).launch, shape)
    return _kernels[key].op


def kernel_reference(name: str) -> Callable[..., Any]:
    """What a kernel must equal. Raises KeyError: there is no such kernel."""
    return _references[_key(name)]


_HIDDEN = "_"


def _hidden(name: str) -> str:
    return f"{_HIDDEN}{name}"


def _key(name: str) -> str:
    for key in (name, _hidden(name)):
        if key in _parts:
            return key
    raise KeyError(f"no kernel of tokred::{name}; there are: {', '.join(kernel_names())}")


def _part(name: str) -> Any:
    module = _parts[_key(name)]
    return import_module(module if "." in module else f"{__package__}.{module}")
