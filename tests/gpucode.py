"""Compile Triton kernels for GPUs on a machine without one: what the interpreter accepts, the compiler may not.

And trace them as Inductor does, which has to see the kernel, and that it writes nothing but its results.

Run as a program, in a process in which Triton's interpreter is not asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import triton
from gpucompile import NoDriver, launches
from kernelcases import CASES
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from tokcompile import kernels

ARCHITECTURES = (80, 90)
SINGLE = {"received_by_sums": (2, 10)}
"""Arguments that are float32 whatever the others are."""


def compile_case(name: str, dtype: torch.dtype) -> None:
    """Compile an operator's kernels for its case, with floats of a dtype; of each its first tile."""
    given = list(CASES[name]())
    other = [at for at in range(len(given)) if at not in SINGLE.get(name, ())]
    cast = tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, given)
    for at in other:
        given[at] = cast[at]
    launched = launches(name, given)
    assert launched
    for launch in launched:
        for architecture in ARCHITECTURES:
            assert launch.compiled(launch.tiles[0], architecture).asm["cubin"]


def trace(name: str, dynamic: bool) -> None:
    """Trace the operator of a kernel as AOTAutograd hands it to Inductor, which has to see the kernel.

    On fake tensors of a CPU: the graph is the same, and a build of torch for CPUs cannot index those of a GPU.

    Args:
        dynamic: whether the number of rows of each tensor is a symbol.

    Raises:
        AssertionError: there is no kernel, or PyTorch takes one to write to something else than new memory.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    leaves, structure = tree_flatten(list(CASES[name]()))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return tuple(tree_leaves(kernels.kernel_op(name)(*tree_unflatten(given, structure))))

    fakes = tuple(_fake(leaves[place], mode, dynamic) for place in places)
    with mode:
        graph = aot_export_joint_simple(call, fakes, trace_joint=False).graph
    seen = [node for node in graph.nodes if node.target is triton_kernel_wrapper_functional]
    assert seen
    for node in seen:
        changed = [node.kwargs["kwargs"][each].target for each in node.kwargs["tensors_to_clone"]]
        assert changed and set(changed) == {torch.ops.aten.empty.memory_format}, (name, changed)


def _fake(value: Tensor, mode: FakeTensorMode, dynamic: bool) -> Tensor:
    if not dynamic:
        return mode.from_tensor(value)
    rest = [DimDynamic.STATIC] * (value.dim() - 1)
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, *rest]))


def main(names: Sequence[str]) -> None:
    """Trace and compile the kernels of some operators, or of all."""
    triton.runtime.driver.set_active(NoDriver())
    names = names or sorted(CASES)
    for name in names:
        for dynamic in (False, True):
            trace(name, dynamic)
    for name in names:
        for dtype in (torch.bfloat16, torch.float32):
            compile_case(name, dtype)
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
