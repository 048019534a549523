"""`make bench-kv`: time and memory of shortened caches, and write docs/cache-speed.md.

Each cell is a process of its own: the full cache in eager mode and under Inductor, the rule under Inductor, and the
same method and budget in kvpress, which has an environment of its own because it needs an older transformers. Those
that are compared take turns, and the best of each counts: a machine that others share is fast at one time and slow at
another. Weights are random, and the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "cache-speed.md"
PEER = "kvpress==0.5.5"
FULL = ("eager", "inductor")
INTRO = """\
# Speed and memory of shortened caches

What `make bench-kv` measured: {made}.
A Llama of {parameters:.0f} million parameters with random weights, float32, {threads} threads, batch 1, in `generate`.
*Prefill* is the time to the first token, the best of all runs; *decode* the median of the {steps} tokens after it, the
best of {turns} processes. These took turns with the others of their context: lines of one context were measured
together. {peer} has the same weights, method and budget, in eager mode, which is how it runs. *Ideal* is a prompt of as
many tokens as the budget, compiled in the same way, of which nothing is evicted.

How many times longer the others take than tokred (above 1: tokred is faster):

| rule | context | budget | decode: full cache, eager | full cache, Inductor | peer | ideal | prefill: Inductor | peer |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{times}

What keys and values hold after the prompt over budget times bytes per token, and what a prompt takes at its peak beside
the model, in MB:

| rule | context | budget | keys and values | peak: full cache, Inductor | peer | tokred |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{memory}
"""


def peer_python(folder: Path, pip: list[str]) -> Path:
    """The Python of an environment that has the peer, made where there is none."""
    python = folder / "bin" / "python"
    if not (folder / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wanted = [PEER, f"torch=={torch.__version__.partition('+')[0]}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pip, *wanted], check=True)
        (folder / ".installed").touch()
    return python


def cell(python: Path | str, how: str, threads: int, **given: Any) -> dict[str, Any]:
    """Run one cell with so many threads, whatever this process was told to use."""
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    command = [python, HERE / "kv_cell.py", how, *options]
    own = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=own)
    return json.loads(done.stdout.strip().splitlines()[-1])


def in_turns(turns: int, calls: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Run cells in turns; of each the best times, and what its first run held."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in calls}
    for _ in range(turns):
        for way, call in calls.items():
            found[way].append(call())
    times = {
        way: {key: min(each[key] for each in runs) for key in ("prefill", "decode")} for way, runs in found.items()
    }
    return {way: {**runs[0], **times[way]} for way, runs in found.items()}


def rows(rule: str, context: int, budget: int, found: dict[str, dict[str, Any]]) -> tuple[str, str]:
    """A line of each table."""
    own = found["tokred"]
    assert own["kept"] == found["kvpress"]["kept"] == budget, "the two keep as many keys"
    decode = [found[way]["decode"] / own["decode"] for way in ("eager", "inductor", "kvpress", "ideal")]
    prefill = [found[way]["prefill"] / own["prefill"] for way in ("inductor", "kvpress")]
    peaks = [found[way]["peak"] / 1e6 for way in ("inductor", "kvpress", "tokred")]
    start = f"| {rule} | {context} | {budget} | "
    times = start + " | ".join(f"{ratio:.2f}" for ratio in (*decode, *prefill)) + " |"
    held = own["cache"] / (budget * own["token"])
    return times, start + " | ".join([f"{held:.3f}", *(f"{peak:.0f}" for peak in peaks)]) + " |"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=["knorm", "snapkv"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="calls of a process that count")
    parser.add_argument("--turns", type=int, default=3, help="processes of each way")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--environment", type=Path, default=Path("build/kvpress"))
    parser.add_argument("--pip", nargs="*", default=[], help="further arguments of pip install")
    given = parser.parse_args()
    other = peer_python(given.environment, given.pip)
    shared = {name: getattr(given, name) for name in ("threads", "budget", "layers", "steps", "rounds")}
    tables: list[tuple[str, str]] = []
    own = partial(cell, sys.executable, **shared)
    for context in given.contexts:
        calls = {way: partial(own, way, context=context) for way in FULL}
        calls["ideal"] = partial(own, "tokred", rule="knorm", context=given.budget)
        for rule in given.rules:
            calls[f"tokred {rule}"] = partial(own, "tokred", rule=rule, context=context)
            calls[f"kvpress {rule}"] = partial(cell, other, "kvpress", rule=rule, context=context, **shared)
        found = in_turns(given.turns, calls)
        for rule in given.rules:
            mine = {way: found[f"{way} {rule}"] for way in ("tokred", "kvpress")}
            tables.append(rows(rule, context, given.budget, found | mine))
            print(*tables[-1], sep="\n", flush=True)
    versions = f"torch {torch.__version__}, {platform.machine()}, {given.threads} threads"
    page = INTRO.format(
        made=f"{datetime.date.today()}, {versions}",
        parameters=given.layers * 7.67 + 12.3,
        threads=given.threads,
        turns=given.turns,
        steps=given.steps,
        peer=PEER,
        times="\n".join(times for times, _ in tables),
        memory="\n".join(memory for _, memory in tables),
    )
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
