"""`make bench-kv`: time and memory of shortened caches, and write docs/cache-speed.md.

Each cell is a process of its own, the ways of one row one after the other: the full cache in eager mode and under
Inductor, the rule under Inductor, and the same method and budget in kvpress, which has an environment of its own
because it needs an older transformers. Weights are random, and the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "cache-speed.md"
PEER = "kvpress==0.5.5"
WAYS = ("eager", "inductor", "tokred", "kvpress")
INTRO = """\
# Speed and memory of shortened caches

What `make bench-kv` measured: {made}.
A Llama of {parameters:.0f} million parameters with random weights, float32, {threads} threads, batch 1; the best of
{rounds} rounds. *Prefill* is `generate` of one token, *decode* the time of each further one of {steps}. The columns are
times of the others over tokred's. {peer} has the same weights, method and budget, in eager mode, which is how it runs.
*Memory* is what keys and values hold after the prompt, over budget times bytes per token; *peak* is what a prompt takes
beside the model, tokred's over the peer's.

| rule | context | budget | decode: full cache, eager | full cache, Inductor | peer | prefill: peer | memory | peak |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
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


def cell(python: Path | str, how: str, **given: Any) -> dict[str, Any]:
    """Run one cell."""
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    done = subprocess.run([python, HERE / "kv_cell.py", how, *options], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(rule: str, context: int, budget: int, found: dict[str, dict[str, Any]]) -> str:
    """A line of the table."""
    own = found["tokred"]
    assert own["kept"] == found["kvpress"]["kept"] == budget, "the two keep as many keys"
    decode = [found[way]["decode"] / own["decode"] for way in ("eager", "inductor", "kvpress")]
    return (
        f"| {rule} | {context} | {budget} | "
        + " | ".join(f"{ratio:.2f}" for ratio in (*decode, found["kvpress"]["prefill"] / own["prefill"]))
        + f" | {own['cache'] / (budget * own['token']):.3f} | {own['peak'] / found['kvpress']['peak']:.2f} |"
    )


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", nargs="+", default=["knorm", "snapkv"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", type=Path, default=Path("build/kvpress"))
    parser.add_argument("--pip", nargs="*", default=[], help="further arguments of pip install")
    given = parser.parse_args()
    other = peer_python(given.environment, given.pip)
    shared = {"budget": given.budget, "layers": given.layers, "steps": given.steps, "rounds": given.rounds}
    lines = []
    for context in given.contexts:
        full = {way: cell(sys.executable, way, context=context, **shared) for way in WAYS[:2]}
        for rule in given.rules:
            each = {"tokred": sys.executable, "kvpress": other}
            found = {way: cell(python, way, rule=rule, context=context, **shared) for way, python in each.items()}
            lines.append(row(rule, context, given.budget, full | found))
            print(lines[-1], flush=True)
    versions = f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads"
    intro = INTRO.format(
        made=f"{datetime.date.today()}, {versions}",
        parameters=given.layers * 7.67 + 12.3,
        threads=torch.get_num_threads(),
        rounds=given.rounds,
        steps=given.steps,
        peer=PEER,
    )
    PAGE.write_text(intro + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
