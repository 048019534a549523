"""Let Inductor write the code in which it launches kernels, and compile that for a GPU, on a machine without one.

What Inductor hands to a kernel is not what a launch from Python does: floats are 64 bits wide, sizes may be symbols,
and the kernel's source is written out with all that it calls. Run as a program, in a process in which Triton's
interpreter is not asked for.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from gpucompile import NoDriver
from kernelcases import CASES, OTHER_CASES
from torch import Tensor
from torch._dynamo.device_interface import CpuInterface
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from tokcompile import kernels

TARGET = GPUTarget("cuda", 90, 32)
SYMBOLS = ("none", "rows", "tokens")
"""Which sizes of a call are symbols: the number of rows of each tensor, or of tokens, the largest size of all."""


class Unlaunched:
    """Stands for a compiled kernel in the code that Inductor runs."""

    def run(self, *args: Any, **words: Any) -> None:
        """Do nothing."""


@contextmanager
def written() -> Iterator[list[tuple[str, str]]]:
    """Keep the name and the source of each kernel that Inductor would compile."""
    found: list[tuple[str, str]] = []

    def keep(self: AsyncCompile, name: str, source: str, device_str: str = "cuda") -> Unlaunched:
        found.append((name, source))
        return Unlaunched()

    with ExitStack() as changes:
        for holder, name, new in (
            (AsyncCompile, "triton", keep),
            # torch 2.15 asks whether the tensors' device has Triton, and what options a launch has there.
            (CpuInterface, "raise_if_triton_unavailable", lambda *_: None),
            (
                triton_helpers,
                "get_backend_options_for_target",
                lambda *_: make_backend(TARGET).parse_options({}).__dict__,
            ),
        ):
            changes.enter_context(mock.patch.object(holder, name, new, create=True))
        yield found


def sources(name: str, args: Sequence[Any], symbols: str) -> list[tuple[str, str]]:
    """Names and sources of the kernels that Inductor makes of the operator of a kernel.

    On fake tensors of a CPU: a build of torch for CPUs has no others, and kernels of users are the same.
    """
    leaves, structure = tree_flatten(list(args))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbols != "none" else None)
    fakes = [_fake(each, mode, symbols, leaves) for each in (leaves[place] for place in places)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return tuple(tree_leaves(kernels.kernel_op(name)(*tree_unflatten(given, structure))))

    with mode:
        graph = aot_export_joint_simple(call, fakes, trace_joint=False, decompositions=select_decomp_table())
    with torch._guards.tracing(torch._guards.TracingContext(mode)), torch.no_grad(), written() as found:
        compile_fx_inner(graph, fakes)
    return found


def _fake(value: Tensor, mode: FakeTensorMode, symbols: str, leaves: Sequence[Any]) -> Tensor:
    if symbols == "none":
        return mode.from_tensor(value)
    if symbols == "rows":
        kinds = [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (value.dim() - 1)]
    else:
        tokens = max(size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape)
        # One symbol for all sizes that are alike.
        kinds = [DimDynamic.DUCK if size == tokens else DimDynamic.STATIC for size in value.shape]
    return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(kinds))


def compile_source(name: str, source: str) -> None:
    """Compile what Inductor wrote of a kernel, with its first tile."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "written.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location("written", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        meta, tile = tuner.triton_meta, tuner.configs[0]
        constants = {**meta["constants"], **tile.kwargs}
        signature = {each: "constexpr" if each in constants else meta["signature"][each] for each in tuner.fn.arg_names}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        made = triton.compile(
            ASTSource(tuner.fn, signature, constants, meta["configs"][0]), target=TARGET, options=options
        )
        assert made.asm["cubin"]


def check(name: str, case: Callable[[], Sequence[Any]]) -> None:
    """Write and compile the kernels of an operator. Raises what Inductor or Triton do."""
    for symbols in SYMBOLS:
        found = sources(name, case(), symbols)
        assert found, f"Inductor sees no kernel in {name}"
        for each in found:
            compile_source(*each)


def main(names: Sequence[str]) -> None:
    """Check the kernels of some operators, or of all."""
    triton.runtime.driver.set_active(NoDriver())
    for name in names or sorted(CASES):
        check(name, CASES[name])
        if name in OTHER_CASES:
            check(name, OTHER_CASES[name])
        print(name)


if __name__ == "__main__":
    main(sys.argv[1:])
