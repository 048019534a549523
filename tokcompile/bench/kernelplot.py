"""The picture of what `tokred bench --kernels` measured."""

from __future__ import annotations

from typing import Any

from tokcompile.bench.kernelbench import Result, Row
from tokcompile.pages.plots import looks, svg


def plot(result: Result) -> str:
    """An SVG: bandwidth over that of a copy, and gain over the reference, by bytes that have to move.

    Raises:
        TokredError: matplotlib is not installed.
    """
    lines: dict[tuple[str, str], list[Row]] = {}
    for row in sorted(result.rows, key=lambda row: (row.op, row.dtype, row.moved)):
        lines.setdefault((row.op, row.dtype), []).append(row)

    def draw(figure: Any) -> None:
        shares, gains = figure.subplots(1, 2)
        for ((op, dtype), rows), look in zip(lines.items(), looks(), strict=False):
            moved = [row.moved / 1e6 for row in rows]
            shares.errorbar(moved, [row.share for row in rows], label=f"{op} {dtype}", **look)
            gains.errorbar(moved, [row.gain for row in rows], **look)
        for axes, name in ((shares, "bandwidth over a copy's"), (gains, "times faster than the reference")):
            axes.set(xscale="log", xlabel="MB moved", ylabel=name, ylim=(0, None))
            axes.axhline(1, color="#999999", linewidth=0.8)
        figure.legend(loc="outside lower center", ncols=4, fontsize=7)

    title = f"Kernels on {result.device}"
    return svg(draw, (11, 5.5 + 0.05 * len(lines)), title, "Bandwidths and gains of kernels by bytes moved")
