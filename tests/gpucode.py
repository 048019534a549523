"""Compile Triton kernels for GPUs on a machine without one: what the interpreter accepts, the compiler may not.

And trace them as Inductor does, which has to see the kernel, and that it writes nothing but its results.

Run as a program, in a process in which Triton's interpreter is not asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from kernelcases import CASES
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokcompile import kernels
from tokcompile.kernels import _library

ARCHITECTURES = (80, 90)
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class Compiled:
    """Stands for a kernel in a launch, and compiles it for the arguments of that launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.made: list[Any] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._compile

    def _compile(self, *args: Any, **words: Any) -> None:
        kernel = self.kernel
        options = {"num_warps": words.pop("num_warps", 4), "num_stages": words.pop("num_stages", 3)}
        while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
            words |= kernel.configs[0].kwargs
            options = {"num_warps": kernel.configs[0].num_warps, "num_stages": kernel.configs[0].num_stages}
            kernel = kernel.fn
        given = dict(zip(kernel.arg_names, args, strict=False)) | words
        fixed = {p.name for p in kernel.params if p.is_constexpr}
        fixed |= {name for name, value in given.items() if isinstance(value, int) and value == 1}
        signature = {name: "constexpr" if name in fixed else _type(given[name]) for name in kernel.arg_names}
        # As Triton does it for the arguments of a launch: what is a multiple of 16 may be read in wider pieces.
        wide = [n for n, name in enumerate(kernel.arg_names) if name not in fixed and _multiple(given[name])]
        aligned = {(n,): [["tt.divisibility", 16]] for n in wide}
        constants = {name: given[name] for name in kernel.arg_names if name in fixed}
        source = ASTSource(kernel, signature, constants, aligned)
        for architecture in ARCHITECTURES:
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            assert made.asm["cubin"]


def _multiple(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


SINGLE = {"received_by_sums": (2, 10)}
"""Arguments that are float32 whatever the others are."""


def compile_case(name: str, dtype: torch.dtype) -> None:
    """Compile a kernel for its case, with floats of a dtype."""
    part = _library._part(name)
    for module in {sys.modules[each] for each in list(sys.modules) if each.startswith("tokcompile.kernels")}:
        if hasattr(module, "wrap_triton"):
            module.wrap_triton = Compiled
    given = list(CASES[name]())
    other = [at for at in range(len(given)) if at not in SINGLE.get(name, ())]
    cast = tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, given)
    for at in other:
        given[at] = cast[at]
    part.launch(*given)


class NoDriver:
    """Stands for a GPU's driver where PyTorch asks what to compile for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", max(ARCHITECTURES), 32)


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
