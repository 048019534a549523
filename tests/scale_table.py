"""`make scale`: time rewrites of models of 4 to 80 layers, and write docs/scale.md."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import scale
import torch
import transformers
from scale import Times

PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
ROUNDS = 5
INTRO = """\
# Time of a rewrite

What `make scale` measured: {made}.
Processor time of one thread, the best of {rounds} rounds, each on a copy of the captured graph. Capture itself (tracing
by Dynamo) is not counted. The models have real widths and no memory for weights; a rule scores the tokens by the
attention of the second block and drops half of them before the third, so that the edit goes through all others.

*axes* is one inference of token axes and *sites* one search for sites; *rewrite* is all else of applying the rule, in
which both run again after the edit; *verify* runs the rewritten graph on shapes. Some of it does not grow with depth,
above all the shapes of the scoring operator, head by head: so a node costs less in a deeper model, and what each layer
adds says whether time is linear.
"""


def per_layer(times: Sequence[Times], first: int, last: int) -> float:
    """Milliseconds that each layer adds between two depths."""
    found = {t.layers: t.total for t in times}
    return (found[last] - found[first]) / (last - first) * 1e3


def section(subject: scale.Subject, times: Sequence[Times]) -> list[str]:
    """The table of one kind of model, and whether its times are linear."""
    lines = [
        f"## {subject.about}",
        "",
        "| layers | nodes | axes, s | sites, s | rewrite, s | verify, s | total, s | µs a node |",
        "| ---: " * 8 + "|",
    ]
    for t in times:
        parts = " | ".join(f"{s:.3f}" for s in (t.axes, t.sites, t.rewrite, t.verify, t.total))
        lines.append(f"| {t.layers} | {t.nodes} | {parts} | {t.per_node:.0f} |")
    found = {t.layers: t.per_node for t in times}
    low, high = per_layer(times, 8, 32), per_layer(times, 32, 80)
    return [
        *lines,
        "",
        f"A node takes {found[80] / found[8]:.2f} times as long at 80 layers as at 8.",
        f"Each layer adds {low:.1f} ms from 8 to 32 layers, and {high:.1f} ms from 32 to 80: "
        f"{high / low:.2f} times as much.",
        "",
    ]


def page(found: Mapping[str, Sequence[Times]], made: str) -> str:
    """The page as Markdown."""
    lines = [INTRO.format(made=made, rounds=ROUNDS)]
    for name, times in found.items():
        lines += section(scale.SUBJECTS[name], times)
    return "\n".join(lines)


def main() -> int:
    """Measure, write."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    found: dict[str, list[Times]] = {}
    for name, subject in scale.SUBJECTS.items():
        for layers in scale.DEPTHS:
            times = scale.measure(subject, scale.captured(subject, layers), layers, ROUNDS)
            found.setdefault(name, []).append(times)
            print(f"{name} {layers}: {times.total:.3f} s, {times.per_node:.0f} µs a node", flush=True)
    made = (
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}"
    )
    PAGE.write_text(page(found, made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
