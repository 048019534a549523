"""Kernels compiled for the launches that would run them, on a machine without a GPU.

For processes in which Triton's interpreter is not asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tokcompile.kernels import _library

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


class NoDriver:
    """Stands for a GPU's driver where PyTorch asks what to compile for."""

    def get_current_target(self) -> GPUTarget:
        return target(90)


class Tile(NamedTuple):
    """One of the ways in which autotuning may compile a kernel: the only one where nothing is tuned."""

    sizes: dict[str, Any]
    warps: int
    stages: int

    def __str__(self) -> str:
        sizes = "".join(f"{name} {size}, " for name, size in self.sizes.items())
        return f"{sizes}{self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Launch:
    """A kernel, the arguments of one launch of it by name, and its tiles."""

    kernel: Any
    given: dict[str, Any]
    tiles: Sequence[Tile]

    def compiled(self, tile: Tile, architecture: int) -> Any:
        """What Triton makes of a tile for sm_ARCHITECTURE."""
        given, names = self.given | tile.sizes, self.kernel.arg_names
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        fixed |= {name for name, value in given.items() if isinstance(value, int) and value == 1}
        signature = {name: "constexpr" if name in fixed else _type(given[name]) for name in names}
        # As Triton does it for the arguments of a launch: what is a multiple of 16 may be read in wider pieces.
        wide = [n for n, name in enumerate(names) if name not in fixed and _multiple(given[name])]
        aligned = {(n,): [["tt.divisibility", 16]] for n in wide}
        source = ASTSource(self.kernel, signature, {name: given[name] for name in names if name in fixed}, aligned)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return triton.compile(source, target=target(architecture), options=options)


def target(architecture: int) -> GPUTarget:
    """A GPU of NVIDIA."""
    return GPUTarget("cuda", architecture, 32)


def launches(name: str, args: Sequence[Any]) -> list[Launch]:
    """What an operator's kernel would launch for some arguments, which may be fake."""
    part = _library._part(name)
    found: list[Launch] = []
    modules = [module for each, module in list(sys.modules.items()) if each.startswith("tokcompile.kernels")]
    wrapped = {module: module.wrap_triton for module in modules if hasattr(module, "wrap_triton")}
    try:
        for module in wrapped:
            module.wrap_triton = lambda kernel: _Recorded(kernel, found.append)
        part.launch(*args)
    finally:
        for module, wrap in wrapped.items():
            module.wrap_triton = wrap
    return found


class _Recorded:
    """Stands for a kernel where it is launched."""

    def __init__(self, kernel: Any, record: Callable[[Launch], None]) -> None:
        self.kernel, self.record = kernel, record

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: Any, **words: Any) -> None:
        kernel = self.kernel
        tiles = [Tile({}, words.pop("num_warps", 4), words.pop("num_stages", 3))]
        while not hasattr(kernel, "arg_names") or hasattr(kernel, "configs"):
            tiles = [Tile(each.kwargs, each.num_warps, each.num_stages) for each in kernel.configs]
            kernel = kernel.fn
        self.record(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | words, tiles))


def _multiple(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
