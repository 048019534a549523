"""`make kernel-code`: compile every kernel for GPUs, and write docs/kernel-code.md."""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
import triton
from machinecode import TOOLS, Code

PAGE = Path(__file__).parent.parent / "docs" / "kernel-code.md"
SCRIPT = Path(__file__).parent / "machinecode.py"
ARCHITECTURES = (80, 90)
INTRO = """\
# What kernels are compiled to

Facts of the machine code of the Triton kernels ([performance.md](performance.md)), and no times: **nothing on this page
was run on a GPU.** Triton and ptxas compile for GPUs on any machine. `make kernel-code` compiled every kernel for the
shapes that `tokred bench --kernels` gives it (2^28 bytes), with every tile that autotuning may choose, and wrote this:
{made}.

A kernel has a row for each dtype of floats. Where figures stand with a slash, they are for sm_80 (A100) / sm_90 (H100).

- *tiles*: how many autotuning may choose from. It tries them on the GPU, and passes over those that do not fit.
- *fit*: how many of them have room in the shared memory of a block: 163 KB on sm_80 / 227 KB on sm_90 / 99 KB on sm_86
  and sm_89, by what the code for sm_80 takes. All columns after this one are of the tiles that fit on sm_80 / sm_90.
- *registers* of a thread, of at most 255.
- *spills*: bytes of a thread that registers do not hold, and that go to local memory; of several tiles, least to most.
- *arrays*: bytes of local memory that the code itself asks for: sines of very large angles do.
- *shared*: KB of shared memory of a block.
- *reads*, *writes*: bytes of global memory that a thread moves at a time; 16 is the most there is.
- *tensor cores*: whether these multiply.
"""
HEADER = (
    "operator | kernel | dtype | tiles | fit | registers | spills | arrays | shared | reads | writes | tensor cores"
)


def span(values: Iterable[int]) -> str:
    """Least and most."""
    found = sorted(set(values))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]}–{found[-1]}"


def listed(values: Iterable[Sequence[int]]) -> str:
    """All that occur, ascending."""
    return ", ".join(str(each) for each in sorted(set(itertools.chain(*values))))


def line(codes: Sequence[Code]) -> str:
    """The row of one kernel and dtype, from what its tiles were compiled to for each of ARCHITECTURES."""
    by = {a: [code for code in codes if code.architecture == a] for a in ARCHITECTURES}
    fit = {a: [code for code in found if code.fits()] for a, found in by.items()}
    small = sum(code.fits(89) for code in by[80])

    def each(said: Callable[[list[Code]], str]) -> str:
        found = [said(fit[a]) if fit[a] else "none" for a in ARCHITECTURES]
        return found[0] if found[0] == found[1] else " / ".join(found)

    cells = [
        *(codes[0].op, codes[0].kernel, codes[0].dtype, f"{len(by[80])}"),
        f"{len(fit[80])} / {len(fit[90])} / {small}",
        each(lambda found: span(code.registers for code in found)),
        each(lambda found: span(code.spilled for code in found)),
        each(lambda found: span(code.stack - code.spilled for code in found)),
        each(lambda found: span(-(-code.shared // 1024) for code in found)),
        each(lambda found: listed(code.reads for code in found)),
        each(lambda found: listed(code.writes for code in found)),
        each(lambda found: "yes" if all(code.tensor_cores for code in found) else "no"),
    ]
    return f"| {' | '.join(cells)} |"


def page(codes: Sequence[Code], made: str) -> str:
    """The page as Markdown."""
    groups: dict[tuple[str, str, str], list[Code]] = {}
    for code in codes:
        groups.setdefault((code.op, code.kernel, code.dtype), []).append(code)
    rows = [line(found) for found in groups.values()]
    return "\n".join([INTRO.format(made=made), f"| {HEADER} |", "| --- " * len(HEADER.split(" | ")) + "|", *rows, ""])


def compiled(*words: str) -> list[Code]:
    """What machinecode.py prints, in a process in which Triton's interpreter is not asked for."""
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    return [Code.read(each) for each in ran.stdout.splitlines()]


def made() -> str:
    """The day, and what compiled."""
    ptxas = subprocess.run([str(TOOLS / "ptxas"), "--version"], capture_output=True, text=True, check=True)
    release = ptxas.stdout.partition("release ")[2].partition(",")[0]
    return f"{datetime.date.today()}, torch {torch.__version__}, Triton {triton.__version__}, ptxas {release}"


def main() -> int:
    """Compile, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, help="what machinecode.py printed, in place of compiling")
    given = parser.parse_args()
    codes = compiled() if given.source is None else [Code.read(each) for each in given.source.read_text().splitlines()]
    PAGE.write_text(page(codes, made()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
