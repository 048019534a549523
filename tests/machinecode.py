"""What Triton and ptxas make of the kernels for a GPU: registers, spills, shared memory, widths of reads and writes.

Run as a program, in a process in which Triton's interpreter is not asked for: it prints a line of JSON for each tile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from gpucompile import NoDriver, launches
from torch._subclasses.fake_tensor import FakeTensorMode

from tokcompile.bench.kernelworkloads import WORKLOADS, Maker

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory that a block may have, by architecture."""
SIZE = 1 << 28
"""Bytes that a call of a workload moves. Its tensors are fake: none of them are allocated."""
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """What one tile of a kernel was compiled to.

    Attributes:
        op: the operator whose workload launches it.
        kernel: the function.
        dtype: of floats.
        architecture: 90 for sm_90.
        tile: sizes, warps and stages.
        registers: of a thread.
        stack: bytes of local memory of a thread.
        spilled: those of them that are not arrays of the code: what registers did not hold.
        shared: bytes of a block.
        instructions: of the whole kernel.
        reads, writes: bytes of global memory at a time, in a thread; copies to shared memory are reads.
        tensor_cores: whether any instruction is one of theirs.
    """

    op: str
    kernel: str
    dtype: str
    architecture: int
    tile: str
    registers: int
    stack: int
    spilled: int
    shared: int
    instructions: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    tensor_cores: bool

    def fits(self, architecture: int | None = None) -> bool:
        """Whether a block has as much shared memory; else Triton raises OutOfResources, and autotuning skips it."""
        return self.shared <= SHARED[architecture or self.architecture]

    @classmethod
    def read(cls, line: str) -> Code:
        """From JSON."""
        words = json.loads(line)
        return cls(**words | {name: tuple(words[name]) for name in ("reads", "writes")})


class Usage(NamedTuple):
    """What `cuobjdump -res-usage` says of one kernel, less the arrays that its code asks for."""

    registers: int
    stack: int
    spilled: int


def usage(said: str, ptx: str) -> Usage:
    """Of what cuobjdump printed of a binary, and its code. Raises ValueError where it says nothing of the kind."""
    found = re.search(r"\bREG:(\d+) STACK:(\d+)\b", said)
    if found is None:
        raise ValueError(f"cuobjdump said nothing of registers: {said!r}")
    registers, stack = int(found[1]), int(found[2])
    # Each array, and the whole, is a multiple of eight bytes.
    arrays = sum(-(-int(size) // 8) * 8 for size in re.findall(r"^\s*\.local\s[^;]*\[(\d+)\];", ptx, re.M))
    return Usage(registers, stack, max(stack - arrays, 0))


_VECTOR = r"(?:\.v(\d))?\.[bufs](\d+)\b"
_COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global\S*\s+\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")


def widths(ptx: str, instruction: str) -> tuple[int, ...]:
    """Bytes that a thread moves at a time, ascending, in all instructions of a kind: `ld.global` or `st.global`."""
    found = re.findall(re.escape(instruction) + r"(?:[.:]+\w+?)*?" + _VECTOR, ptx)
    return tuple(sorted({int(count or 1) * int(bits) // 8 for count, bits in found}))


def reads(ptx: str) -> tuple[int, ...]:
    """Widths of all that is read from global memory, into registers or into shared memory."""
    copies = {int(each, 0) for each in _COPY.findall(ptx)}
    return tuple(sorted({*widths(ptx, "ld.global"), *copies}))


def tensor_cores(ptx: str) -> bool:
    """Whether tensor cores multiply."""
    return re.search(r"\b(wgmma\.mma_async|mma\.sync)\b", ptx) is not None


def instructions(sass: str) -> int:
    """How many there are in what cuobjdump lists, but for those that fill up the end."""
    return sum(not each.startswith("NOP") for each in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*)", sass, re.M))


def _widest(op: str) -> tuple[Any, ...]:
    """Heads of 256 floats, and 64 rows of queries for each head of keys: what takes most shared memory."""
    key, many = torch.empty(1, 2, 4096, 256), torch.empty(1, 4, 4096, 256)
    row, how = torch.empty(1, 8, 64, 256), (0.1, False, 0.0)
    return {
        "attend": (torch.empty(1, 2, 64, 256), key, key, None, 0.1, 0.0, None),
        "attend_chosen": (row[:, :2], key, key, None, torch.empty(1, 2, 512, dtype=torch.int64), 0.1, 0.0, None),
        "attend_with_sums": (many, key, key, None, *how),
        "attention_received": (many, key, None, None, *how, "mean", "mean", None),
        "attention_row": (row, key, None, torch.empty(1, dtype=torch.int64), *how, "mean", None),
        "key_attention": (row, key, None, None, 64, 2, *how, "mean", "mean", None),
        "key_votes": (row[:, :, 0], key, None, 4, 64),
    }[op]


WIDEST = (
    "attend",
    "attend_chosen",
    "attend_with_sums",
    "attention_received",
    "attention_row",
    "key_attention",
    "key_votes",
)


def scan(op: str, architectures: Sequence[int], widest: bool = False) -> Iterator[Code]:
    """All kernels that an operator's workload launches, in all dtypes and with all tiles; or the widest heads."""
    for dtype in (torch.float32,) if widest else WORKLOADS[op].dtypes:
        with FakeTensorMode():
            args = _widest(op) if widest else WORKLOADS[op].make(Maker(torch.device("cpu"), dtype, SIZE))
            launched = launches(op, args)
        for launch in launched:
            for architecture in architectures:
                for tile in launch.tiles:
                    names = (op, launch.kernel.__name__, str(dtype).removeprefix("torch."), architecture, str(tile))
                    yield Code(*names, *_facts(launch.compiled(tile, architecture)))


def _facts(made: Any) -> tuple[Any, ...]:
    ptx = made.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        used = usage(_run("cuobjdump", "-res-usage", file.name), ptx)
        count = instructions(_run("cuobjdump", "-sass", file.name))
    return *used, made.metadata.shared, count, reads(ptx), widths(ptx, "st.global"), tensor_cores(ptx)


def _run(tool: str, *words: str) -> str:
    return subprocess.run([str(TOOLS / tool), *words], capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print what each tile of some operators' kernels was compiled to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="operators; all of them if none is named")
    parser.add_argument("--architecture", type=int, action="append", choices=sorted(SHARED), help="90 for sm_90")
    parser.add_argument("--widest", action="store_true", help=f"heads of 256 floats; of {', '.join(WIDEST)}")
    given = parser.parse_args()
    triton.runtime.driver.set_active(NoDriver())
    for op in given.ops or (WIDEST if given.widest else sorted(WORKLOADS)):
        for code in scan(op, given.architecture or (80, 90), given.widest):
            print(json.dumps(asdict(code)), flush=True)


if __name__ == "__main__":
    main()
