"""The `tokred_triton::` operators: Triton kernels behind the schemas of the ops that they stand for.

The Triton part of an op is a module of this folder that is imported only when it is asked for, because Triton may be
missing. It has two functions that take the arguments of the op:

- `supports(*args) -> str | None`: why the kernel cannot run on these tensors, real or fake; None when it can;
- `launch(*args)`: the op's results, all of them new and contiguous, made by kernels that `wrap_triton` wraps.

An operator made of the two has the shapes of its reference under fake tensors, and the gradients of its reference. On a
GPU it is a `torch.library.triton_op`, into which Inductor sees. Under Triton's interpreter (TRITON_INTERPRET=1), which
runs kernels on a CPU and cannot be traced, it is opaque.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, Signature
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

NAMESPACE = "tokred_triton"


class Kernel(NamedTuple):
    """An operator, and the definition that keeps it registered."""

    op: Any
    definition: Any


# Triton ops are defined by annotated functions, not by schemas.
_ANNOTATIONS: dict[str, Any] = {
    "Tensor": Tensor,
    "Optional[Tensor]": Optional[Tensor],  # noqa: UP045  torch takes no other spelling
    "List[Tensor]": Sequence[Tensor],
    "int": int,
    "bool": bool,
    "float": float,
    "str": str,
    "Optional[int]": Optional[int],  # noqa: UP045
    "Optional[float]": Optional[float],  # noqa: UP045
    "List[int]": Sequence[int],
    "List[float]": Sequence[float],
    "Optional[List[int]]": Optional[Sequence[int]],  # noqa: UP045
}


@functools.cache
def missing() -> str | None:
    """Why Triton cannot be imported; None when it can."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return None


def interpreted() -> bool:
    """Whether kernels that are imported now run under Triton's interpreter, and so on tensors of a CPU."""
    if missing():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def wrap_triton(kernel: Any) -> Any:
    """`torch.library.wrap_triton`, and the kernel itself where the interpreter runs it, which torch 2.11 refuses."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    inner = kernel
    while isinstance(inner, Autotuner):
        inner = inner.fn
    return torch.library.wrap_triton(kernel) if isinstance(inner, JITFunction) else kernel


def register(
    schema: str, reference: Callable[..., Any], launch: Callable[..., Any], shape: Callable[..., Any]
) -> Kernel:
    """Register `tokred_triton::NAME`.

    Args:
        schema: as for `_library.define`.
        reference: gives gradients.
        launch: makes the results.
        shape: gives shapes and dtypes of the results, for fake tensors.
    """
    name = f"{NAMESPACE}::{schema.partition('(')[0].strip()}"
    function = _annotated(schema, launch)
    make = torch.library.custom_op if interpreted() else torch.library.triton_op
    definition = make(name, function, mutates_args=())
    definition.register_fake(functools.partial(_fake, shape))
    definition.register_autograd(functools.partial(_backward, reference), setup_context=_save)
    space, _, short = name.partition("::")
    return Kernel(getattr(getattr(torch.ops, space), short).default, definition)


def _annotated(schema: str, launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` under the types of a schema."""
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{schema}")

    @functools.wraps(launch)
    def function(*args: Any) -> Any:
        return launch(*args)

    words = [
        Parameter(
            each.name,
            Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_ANNOTATIONS[str(each.type)],
            default=each.default_value if each.has_default_value() else Parameter.empty,
        )
        for each in parsed.arguments
    ]
    function.__signature__ = Signature(words, return_annotation=_returned(parsed.returns))
    return function


def _returned(returns: Sequence[Any]) -> Any:
    if len(returns) > 1:
        return tuple[tuple(Tensor for _ in returns)]
    return list[Tensor] if str(returns[0].type) == "List[Tensor]" else Tensor


def _fake(shape: Callable[..., Any], *args: Any) -> Any:
    return tree_map(lambda each: torch.empty_like(each, memory_format=torch.contiguous_format), shape(*args))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    del output
    leaves, ctx.structure = tree_flatten(list(inputs))
    ctx.save_for_backward(*(each for each in leaves if isinstance(each, Tensor)))
    ctx.others = [None if isinstance(each, Tensor) else (each,) for each in leaves]


def _backward(reference: Callable[..., Any], ctx: Any, *grads: Any) -> Any:
    """The gradients of the reference, which is run once more; not differentiable again."""
    saved = iter(ctx.saved_tensors)
    leaves = [next(saved) if other is None else other[0] for other in ctx.others]
    with torch.enable_grad():
        leaves = [
            each.detach().requires_grad_(each.requires_grad) if isinstance(each, Tensor) else each for each in leaves
        ]
        args = tree_unflatten(leaves, ctx.structure)
        wanted = [each for each in leaves if isinstance(each, Tensor) and each.requires_grad]
        found = iter(_gradients(tree_leaves(reference(*args)), tree_leaves(list(grads)), wanted))
    return tuple(_like_tensors(each, found) for each in args)


def _gradients(made: list[Tensor], grads: list[Tensor | None], wanted: list[Tensor]) -> Sequence[Tensor | None]:
    pairs = [(m, g) for m, g in zip(made, grads, strict=True) if g is not None and m.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    ends, their = zip(*pairs, strict=True)
    return torch.autograd.grad(ends, wanted, their, allow_unused=True)


def _like_tensors(argument: Any, found: Iterator[Tensor | None]) -> Any:
    """What autograd asks for an argument: its gradient, a list of them for a list of tensors, else None."""
    if isinstance(argument, Tensor):
        return next(found) if argument.requires_grad else None
    is_list = isinstance(argument, (list, tuple)) and any(isinstance(each, Tensor) for each in argument)
    return [_like_tensors(each, found) for each in argument] if is_list else None
