"""`make bench-export`: time ONNX files of models of real size under rules, and write docs/export-speed.md.

Each cell is a process of its own. The files of one row are run in turns: the model as it is, under a rule, and its
ideal.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import torch
from export_cell import MODELS, WORDS

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "export-speed.md"
NEAR = 1e-3
"""How far logits of a file may be from those of PyTorch, over the greatest of them."""
INTRO = """\
# Speed of exported models

What `{command}` measured: {made}.
Models of the proportions of real ones, with random weights, as ONNX files of opset 18, float32, batch 1, fixed sizes: a
prompt of one image and {words} tokens of text, to the logits of its last token and its caches. `keep` is {keep}. ONNX
Runtime on the CPU with {threads} threads; the best of {runs} runs. The files of a model take turns, each time in a
process of its own.

The load of the machine was {load} when this began and {load_after} when it ended, on {cores} cores: other work makes
times longer than they need be, and ratios of times less exact. *Work* is what processors spent, which other work
touches less.

*Ideal* is the same rewritten graph with the tokens that stay given as constants: the model on what is left, and nothing
scored or chosen. *Apart* is the greatest difference of the logits of the pruned file from PyTorch's, over the greatest
logit.

| model | rule | image tokens | kept | full / pruned: time | work | pruned / ideal: time | work | apart |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{table}

`hiprune` drops at the projector: the vision tower sees all of the image, and that is where most of the time goes in
small models. `fastv` drops before the third layer of the text.
"""


def cell(*words: Any) -> dict[str, Any]:
    """Run one cell."""
    command = [sys.executable, HERE / "export_cell.py", *words]
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(folder: Path, names: list[str], rounds: int, each: int, threads: int) -> dict[str, Found]:
    """Run files in turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    order, shuffle = list(names), random.Random(0)
    for number in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            runs[name].append(cell("run", folder / f"{name}.onnx", "--rounds", each, "--threads", threads))
            print(number + 1, name, runs[name][-1], file=sys.stderr, flush=True)
    return {name: best(found) for name, found in runs.items()}


class Found(NamedTuple):
    """The best time of a file in seconds, by the clock and of processors, and how far its logits are from PyTorch's."""

    clock: float
    work: float
    apart: float


def best(runs: list[dict[str, Any]]) -> Found:
    """What the runs of a file say of it."""
    spent = [both for run in runs for both in run["spent"]]
    apart = max(run["apart"] for run in runs)
    assert apart < NEAR, f"logits differ from PyTorch's by {apart:.2g} of the greatest"
    return Found(min(clock for clock, _ in spent), min(work for _, work in spent), apart)


def row(model: str, rule: str, about: dict[str, Any], found: dict[str, Found]) -> str:
    """A line of the table."""
    full, pruned, ideal = found["full"], found[f"{rule}.pruned"], found[f"{rule}.ideal"]
    tokens = about["tokens"]
    assert tokens[f"{rule}.pruned"] == tokens[f"{rule}.ideal"]
    kept = about["images"] - (tokens["full"] - tokens[f"{rule}.pruned"])
    ratios = [
        full.clock / pruned.clock,
        full.work / pruned.work,
        pruned.clock / ideal.clock,
        pruned.work / ideal.work,
    ]
    cells = [model, rule, about["images"], kept, *(f"{ratio:.2f}" for ratio in ratios), f"{pruned.apart:.0e}"]
    return f"| {' | '.join(map(str, cells))} |"


def _command(words: list[str]) -> str:
    """What was asked for; where files lay for a while is nobody's concern."""
    at = words.index("--folder") if "--folder" in words else len(words)
    words = words[:at] + words[at + 2 :]
    return f'make bench-export BENCH_ARGS="{" ".join(words)}"' if words else "make bench-export"


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rules", nargs="+", default=["hiprune", "fastv"])
    parser.add_argument("--keep", default="1/4")
    parser.add_argument("--tiles", type=int, default=17, help="of the image of SmolVLM, of 64 tokens each")
    parser.add_argument("--rounds", type=int, default=4, help="turns of the files of a row")
    parser.add_argument("--each", type=int, default=2, help="timed runs of a file in one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where files of some gigabytes lie for a while")
    parser.add_argument("--out", type=Path, default=PAGE)
    given = parser.parse_args()
    load, lines = f"{os.getloadavg()[0]:.1f}", []
    for model in given.models:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            folder = Path(name)
            size = ("--keep", given.keep, "--tiles", given.tiles)
            about = cell("write", model, folder, "--rules", *given.rules, *size)
            found = measure(folder, list(about["tokens"]), given.rounds, given.each, given.threads)
        lines += [row(model, rule, about, found) for rule in given.rules]
        print(*lines[-len(given.rules) :], sep="\n", flush=True)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {platform.machine()}"
    page = INTRO.format(
        made=f"{datetime.date.today()}, {versions}",
        command=_command(sys.argv[1:]),
        keep=given.keep,
        load_after=f"{os.getloadavg()[0]:.1f}",
        words=WORDS,
        threads=given.threads,
        runs=given.rounds * given.each,
        load=load,
        cores=os.cpu_count(),
        table="\n".join(lines),
    )
    given.out.write_text(page)


if __name__ == "__main__":
    main()
