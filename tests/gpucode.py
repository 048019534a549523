"""Compile Triton kernels for GPUs on a machine without one: what the interpreter accepts, the compiler may not.

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
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import tokcompile  # noqa: F401
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
        source = ASTSource(kernel, signature, {name: given[name] for name in kernel.arg_names if name in fixed})
        for architecture in ARCHITECTURES:
            made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
            assert made.asm["cubin"]


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def compile_case(name: str, dtype: torch.dtype) -> None:
    """Compile a kernel for its case, with floats of a dtype."""
    part = _library._part(name)
    for module in {sys.modules[each] for each in list(sys.modules) if each.startswith("tokcompile.kernels")}:
        if hasattr(module, "wrap_triton"):
            module.wrap_triton = Compiled
    given = tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, list(CASES[name]())
    )
    part.launch(*given)


def main(names: Sequence[str]) -> None:
    """Compile the kernels of some operators, or of all."""
    for name in names or sorted(CASES):
        for dtype in (torch.bfloat16, torch.float32):
            compile_case(name, dtype)
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
