"""Time Triton kernels against their references under Inductor, and against what copying the same bytes costs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import RenderableType
from rich.progress import Progress
from rich.table import Table
from torch.utils._pytree import tree_leaves

from tokcompile import kernels
from tokcompile.bench.kernelrivals import RIVALS, Rival
from tokcompile.bench.kernelworkloads import WORKLOADS, Maker, held
from tokcompile.errors import LowerError, known
from tokcompile.kernels import _library
from tokcompile.lowering.choosekernels import weighed
from tokcompile.report import versions

SMALL = (1 << 20, 1 << 24)
"""Bytes of sizes that only say from where on a kernel wins; what they take is mostly launches."""
BEYOND_L2 = (2, 4, 8)
"""Further sizes, in times of the L2 cache: bandwidths are those of the memory."""

Clock = Callable[[Callable[[], object]], float]
"""Milliseconds of a call."""


@dataclass(frozen=True)
class Row:
    """One operator at one size.

    Attributes:
        size: bytes asked for.
        moved: bytes that have to move.
        held: bytes of the tensors by which kernels are chosen.
        kernel, reference: milliseconds; of the reference, or of what runs without the kernel, as Inductor compiles it.
        share: bytes a second that the kernel moves, of those of a copy of that size.
        others: milliseconds of what `kernelrivals.py` has for the operator, or why one failed: what stores all weights
            does when memory ends.
    """

    op: str
    dtype: str
    size: int
    moved: int
    held: int
    kernel: float
    reference: float
    share: float
    others: dict[str, float | str] = field(default_factory=dict)

    @property
    def gain(self) -> float:
        """How many times faster than the reference."""
        return self.reference / self.kernel


@dataclass
class Result:
    """All that was measured on a device.

    Attributes:
        copy: bytes a millisecond, read and written, of a copy, by the size asked for.
        skipped: operators that were not measured, and why.
    """

    device: str
    copy: dict[int, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "versions": versions()}

    def table(self) -> dict[str, Any]:
        """As `kernels/measured.json` has it: from the least size on from which a kernel was never slower."""
        found: dict[str, dict[str, int | None]] = {}
        for op, dtype in dict.fromkeys((row.op, row.dtype) for row in self.rows):
            own = sorted((r for r in self.rows if (r.op, r.dtype) == (op, dtype)), key=lambda r: -r.size)
            least = None
            for row in own:
                if row.gain < 1:
                    break
                least = row.held
            found.setdefault(op, {})[dtype] = least
        return {"unmeasured": "reference", "devices": {self.device: found}}


AHEAD = 20_000_000
"""Clock cycles that a GPU waits before calls are timed, so that what is timed is its work, and not Python's."""


class CudaClock:
    """Median of CUDA events around calls, each after something else has filled the L2 cache."""

    def __init__(self, rounds: int = 30, warmup: int = 5) -> None:
        self.rounds, self.warmup = rounds, warmup
        self._other = torch.empty(2 * l2_bytes(), dtype=torch.uint8, device="cuda")

    def __call__(self, run: Callable[[], object]) -> float:
        for _ in range(self.warmup):
            run()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.rounds)]
        torch.cuda.synchronize()
        torch.cuda._sleep(AHEAD)
        for start, end in events:
            self._other.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in events)


def l2_bytes() -> int:
    """Size of the GPU's L2 cache."""
    return torch.cuda.get_device_properties().L2_cache_size


def needs_gpu(what: str = "kernels") -> None:
    """Raise LowerError where no GPU is here."""
    if not torch.cuda.is_available():
        raise LowerError(
            f"{what} are measured on a GPU, and there is none here",
            found=f"torch {torch.__version__}, torch.cuda.is_available() is False",
            remedy="run it on a machine with a GPU and a build of torch for it; nothing is estimated without one",
        )


def default_sizes() -> tuple[int, ...]:
    """Bytes of the sizes on the GPU that is here: two small ones and three beyond its L2 cache."""
    return (*SMALL, *(times * l2_bytes() for times in BEYOND_L2))


def names(asked: Sequence[str]) -> list[str]:
    """The operators to measure: all that have a kernel, or those that are asked for.

    Raises:
        LowerError: one that is asked for has no kernel.
    """
    every = [*kernels.kernel_names(), *kernels.joint_names()]
    for name in asked:
        if name not in every:
            raise LowerError(f"operator '{name}' has no kernel", remedy=known(name, every))
    return list(asked) or every


def bench(
    ops: Sequence[str], sizes: Sequence[int], clock: Clock, device: str, name: str, bar: Progress | None = None
) -> Result:
    """Measure kernels.

    Args:
        ops: names of operators.
        sizes: bytes that a call should move.
        clock: what times a call.
        device: where tensors are made.
        name: of the device, for the report.
        bar: shows what is being measured.
    """
    result = Result(name)
    task = bar.add_task("copy", total=len(ops)) if bar is not None else None
    for size in sizes:
        result.copy[size] = copy_rate(size, clock, device)
    for op in ops:
        if bar is not None:
            bar.update(task, description=op, advance=1)
        if op not in WORKLOADS:
            result.skipped[op] = "no workload in kernelworkloads.py"
            continue
        for dtype in WORKLOADS[op].dtypes:
            for size in sizes:
                _measure(result, op, Maker(torch.device(device), dtype, size), clock)
    return result


def copy_rate(size: int, clock: Clock, device: str) -> float:
    """Bytes a millisecond, read and written, of a copy that moves so many."""
    source = torch.zeros(max(size // 2, 1), dtype=torch.uint8, device=device)
    into = torch.empty_like(source)
    return 2 * source.numel() / clock(lambda: into.copy_(source))


def _measure(result: Result, op: str, maker: Maker, clock: Clock) -> None:
    load = WORKLOADS[op]
    args = load.make(maker)
    fault = kernels.kernel_fault(op, args)
    if fault:
        result.skipped[f"{op} in {maker.dtype}"] = fault
        return
    run = load.run() if load.run else kernels.kernel_op(op)
    made = [each for each in tree_leaves(run(*args)) if isinstance(each, torch.Tensor)]
    counted = weighed(op, args, made)
    torch._dynamo.reset()
    plain = torch.compile(_usual(op), dynamic=False)
    spent, usual = clock(lambda: run(*args)), clock(lambda: plain(*args))
    moved = load.moved(args, made)
    dtype = str(max(counted, key=held).dtype).removeprefix("torch.")
    share = moved / spent / result.copy[maker.size]
    others = {name: _timed(rival, args, clock) for name, rival in RIVALS.get(op, {}).items()}
    result.rows.append(Row(op, dtype, maker.size, moved, held(*counted), spent, usual, share, others))


def _timed(rival: Rival, args: tuple[Any, ...], clock: Clock) -> float | str:
    try:
        return clock(rival(*args))
    except (RuntimeError, NotImplementedError) as error:
        return str(error).partition("\n")[0] or type(error).__name__


def _usual(op: str) -> Callable[..., Any]:
    """What a compiled graph runs without the kernel: what its workload says, the operator, or its own reference."""
    usual, known = WORKLOADS[op].usual, op in _library.names()
    if usual:
        return usual()
    return getattr(torch.ops.tokred, op) if known else _library.kernel_reference(op)


def render(result: Result, plain: bool) -> RenderableType:
    """A table for a terminal; a plain one has no frame."""
    table = Table(title=None if plain else result.device, box=None if plain else Table().box)
    for title in ("operator", "dtype", "MB moved", "kernel ms", "reference ms", "gain", "of copy", "others"):
        table.add_column(title, justify="left" if title in ("operator", "dtype", "others") else "right")
    for row in result.rows:
        figures = f"{row.moved / 1e6:.1f}", f"{row.kernel:.3f}", f"{row.reference:.3f}", f"{row.gain:.2f}x"
        others = ", ".join(f"{name} {_gain(spent, row)}" for name, spent in row.others.items())
        table.add_row(row.op, row.dtype, *figures, f"{row.share:.0%}", others)
    return table


def _gain(spent: float | str, row: Row) -> str:
    return "failed" if isinstance(spent, str) else f"{spent / row.kernel:.2f}x"


def write_table(result: Result, path: Path) -> None:
    """Write from which size on each kernel wins, as TOKRED_KERNELS_TABLE reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.table(), indent=2) + "\n", encoding="utf-8")
