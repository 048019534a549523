"""The `tokred::` operator library: how each file of this folder registers its op.

An op has one implementation, its reference in plain torch ops, registered as CompositeImplicitAutograd. So eager, fake
tensors, symbolic shapes, autograd and Inductor all follow from the reference, while a pre-dispatch trace and
torch.export keep the op as one node `torch.ops.tokred.NAME.default`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "tokred"

# A reload of this module runs in the same globals: the library and its table have to survive it, because dropping a
# Library unregisters its ops and leaves dangling nodes in the graphs that were captured before.
_library: torch.library.Library = globals().get("_library") or torch.library.Library(NAMESPACE, "FRAGMENT")
_references: dict[str, Callable[..., torch.Tensor]] = globals().get("_references") or {}
_schemas: dict[str, str] = globals().get("_schemas") or {}


def define(schema: str, reference: Callable[..., torch.Tensor]) -> Any:
    """Register `tokred::NAME` with `reference` as its implementation and return its OpOverload.

    Args:
        schema: ATen schema without the namespace, e.g. `"last_valid(Tensor padding_mask) -> Tensor"`.
        reference: plain torch ops; no data-dependent shapes, no `.item()`, no in-place change of an argument.

    Defining a name again with the same schema (a module reload) swaps the reference and keeps the op.

    Raises:
        ValueError: the name is taken with another schema.
    """
    name = schema.partition("(")[0].strip()
    known = _schemas.get(name)
    if known is not None and known != schema:
        raise ValueError(f"tokred::{name} is already defined as `{known}`; a new schema needs a new process")
    _references[name] = reference
    if known is None:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, lambda *args, **kwargs: _references[name](*args, **kwargs), "CompositeImplicitAutograd")
        _schemas[name] = schema
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def reference_of(name: str) -> Callable[..., torch.Tensor]:
    """The reference implementation of `tokred::name`. Raises KeyError, naming the known ops, when there is none."""
    if name not in _references:
        raise KeyError(f"no op tokred::{name}; known: {', '.join(sorted(_references))}")
    return _references[name]


def names() -> tuple[str, ...]:
    """All registered ops, sorted."""
    return tuple(sorted(_references))
