"""`make bench-gpu`: time kernels and whole models on a GPU, and write the tables of docs/performance.md.

Each part is a process of its own, and its figures are kept as JSON in docs/gpu: parts that are there are not measured
again, so that a run may be cut off. Kernels that were measured to win are used in the models. The tables have a row for
what is not measured, which says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from tokcompile.bench import kernelbench
from tokcompile.bench.kernelbench import Result, Row
from tokcompile.bench.kerneltargets import Figure, cells, targets
from tokcompile.bench.kernelworkloads import WORKLOADS

DOCS = Path(__file__).parent.parent / "docs"
PAGE, RESULTS = DOCS / "performance.md", DOCS / "gpu"
MISSING = "not yet measured"
SECTION = "<!-- {name}: written by make bench-gpu -->\n"
END = "<!-- end -->"


@dataclass(frozen=True)
class End:
    """A whole model under a rule.

    Attributes:
        model, rule, words: as `tokred bench --end-to-end` takes them.
        claim: what the method's authors say, on their code and machine.
    """

    name: str
    model: str
    rule: str
    words: tuple[str, ...]
    claim: str


ENDS = (
    End("llava-hiprune", "zoo:llava-1.5-7b", "hiprune", ("keep=64",), "up to 9 times less latency, without a cache"),
    End("llava-fastv", "zoo:llava-1.5-7b", "fastv", ("keep=1/4",), "first token 1.64 times faster (13B, A100)"),
    End("qwen-pospad", "zoo:qwen2.5-vl-7b", "pospad", ("keep=3/10",), "up to 1.44 times faster, 17 % less memory"),
    End("llama-32k-snapkv", "zoo:llama-3.1-8b", "snapkv", ("budget=1024", "--prompt", "32768"), ""),
    End("llama-128k-snapkv", "zoo:llama-3.1-8b", "snapkv", ("budget=1024", "--prompt", "131072"), ""),
    End(
        "llama-8k-dapq",
        "zoo:llama-3.1-8b",
        "dapq",
        ("budget=256", "--prompt", "8192"),
        "10.68 tokens a second in place of 11.59, first token 1.1298 s in place of 1.1106 s (H20)",
    ),
    End(
        "llama-128k-tokenselect",
        "zoo:llama-3.1-8b",
        "tokenselect",
        ("positions=keep", "--prompt", "131072"),
        "up to 2.28 times faster (A100)",
    ),
)
KERNELS = tuple(f"kernels-{op}" for op in WORKLOADS)
PARTS = ("targets", *KERNELS, *(each.name for each in ENDS))
TABLE = "table.json"
"""What was measured of kernels, for those that choose them."""


def command(part: str) -> list[str]:
    """What measures a part."""
    if part == "targets":
        return ["bench", "--targets", "--json"]
    if part in KERNELS:
        return ["bench", "--kernels", "--op", part.removeprefix("kernels-"), "--json"]
    end = next(each for each in ENDS if each.name == part)
    rounds = ("--rounds", "2") if "131072" in end.words else ()
    return ["bench", "--end-to-end", end.model, end.rule, *end.words, *rounds, "--json"]


def measure(part: str, folder: Path) -> dict[str, Any]:
    """Measure a part: what the command printed, with the day and the command; or why it failed."""
    words, table = command(part), folder / TABLE
    own = {**os.environ, **({"TOKRED_KERNELS_TABLE": str(table)} if table.exists() else {})}
    done = subprocess.run([sys.executable, "-m", "tokcompile", *words], stdout=subprocess.PIPE, text=True, env=own)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {"ok": False, "error": f"the command ended with {done.returncode}"}
    return {**found, "date": str(date.today()), "command": f"tokred {' '.join(words)}"}


def write_table(folder: Path) -> None:
    """Write which kernels won, for those that were measured."""
    found = [each for part, each in results(folder).items() if part in KERNELS]
    if found:
        rows = [Row(**row) for each in found for row in each["rows"]]
        kernelbench.write_table(Result(found[0]["device"], rows=rows), folder / TABLE)


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """What was measured of each part; parts that failed are left out."""
    paths = ((part, folder / f"{part}.json") for part in PARTS)
    found = {part: json.loads(path.read_text(encoding="utf-8")) for part, path in paths if path.exists()}
    return {part: each for part, each in found.items() if each.get("ok", True)}


def sections(found: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Lines of each section of the page, by its name."""
    return {
        "targets": [*_when(found.get("targets")), *_targets(found.get("targets"))],
        "kernels": list(_kernels([found[part] for part in KERNELS if part in found])),
        "models": [line for end in ENDS for line in _when(found.get(end.name), quiet=True)] + list(_ends(found)),
    }


def written(page: str, made: dict[str, list[str]]) -> str:
    """The page with its sections written anew."""
    for name, lines in made.items():
        start = SECTION.format(name=name)
        parts = re.split(f"{re.escape(start)}.*?{re.escape(END)}", page, flags=re.S)
        assert len(parts) == 2, f"the page has {len(parts) - 1} sections '{name}'"
        page = "\n".join([start.strip(), *lines, END]).join(parts)
    return page


def _when(found: dict[str, Any] | None, quiet: bool = False) -> Iterator[str]:
    """What was run when, and on what."""
    if found is None:
        if not quiet:
            yield from ("No GPU was at hand: not yet measured.", "")
        return
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    yield from (f"`{found['command']}`, {found['date']}, {found['device']}, {versions}.", "")


def _targets(found: dict[str, Any] | None) -> Iterator[str]:
    yield from ("| what | sizes | limit | here | holds |", "| --- | --- | --- | ---: | --- |")
    names = list(Figure.__dataclass_fields__)
    if found is None:
        every = [Figure(e.name, e.case, e.limit, e.at_most, None, MISSING) for e in targets(sizes=(1,))]
    else:
        every = [Figure(**{name: each[name] for name in names}) for each in found["targets"]]
    for each in every:
        limit, here, holds = cells(each)
        yield _row(each.name, each.case, limit, here, "" if found is None else holds)


def _kernels(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield from _when({**found[0], "command": "tokred bench --kernels"} if found else None)
    if not found:
        return
    heads = ("kernel", "dtype", "MB moved", "ms", "reference / kernel", "of copy", "others / kernel")
    yield from (_row(*heads), "| --- | --- | ---: | ---: | ---: | ---: | --- |")
    for row in (row for each in found for row in each["rows"]):
        spent = row["kernel"]
        others = (
            f"{name} {'failed' if isinstance(other, str) else f'{other / spent:.2f}'}"
            for name, other in row["others"].items()
        )
        figures = f"{row['moved'] / 1e6:.1f}", f"{spent:.3f}", f"{row['reference'] / spent:.2f}", f"{row['share']:.0%}"
        yield _row(f"`{row['op']}`", row["dtype"], *figures, ", ".join(others))


def _ends(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    heads = (
        *("model", "rule", "prompt", "prefill: eager / ruled", "full / ruled", "ruled / ideal"),
        *("decode: eager / ruled", "full / ruled", "ruled / ideal", "peak MB: full", "ruled", "ideal", "the authors"),
    )
    yield from (_row(*heads), "| --- | --- |" + " ---: |" * 10 + " --- |")
    for end in ENDS:
        about = end.model.removeprefix("zoo:"), f"`{' '.join([end.rule, *_options(end)])}`"
        own = found.get(end.name)
        yield _row(*about, *(_end(own) if own else [_prompt(end), MISSING, *[""] * 8]), end.claim)


def _options(end: End) -> Iterator[str]:
    yield from (word for word in end.words if "=" in word)


def _prompt(end: End) -> str:
    """Words of the prompt, where it is asked for."""
    return f"{int(end.words[-1]):,}" if "--prompt" in end.words else ""


def _end(found: dict[str, Any]) -> Iterator[str]:
    ways = {way["name"]: way for way in found["ways"]}
    yield f"{found['prompt']:,}"
    for key in ("prefill", "decode"):
        ruled = ways["ruled"][key]
        yield from (f"{ways[way][key] / ruled:.2f}" for way in ("eager", "full"))
        # A prompt as short as what a rule leaves of a cache is no ideal of a prompt.
        yield "" if key == "prefill" and found["ideal"] == "short" else f"{ruled / ways['ideal'][key]:.2f}"
    yield from (
        "" if ways[way]["peak"] is None else f"{ways[way]['peak'] / 1e6:.0f}" for way in ("full", "ruled", "ideal")
    )


def _row(*words: str) -> str:
    return f"| {' | '.join(words)} |"


def main(given: Sequence[str] | None = None) -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no part after so many")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where figures are kept")
    parser.add_argument("--page", type=Path, default=PAGE)
    asked = parser.parse_args(given)
    asked.results.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    for part in asked.only:
        path = asked.results / f"{part}.json"
        if time.monotonic() - begin > asked.seconds or (path.exists() and not asked.fresh):
            continue
        found = measure(part, asked.results)
        if not found.get("ok", True):
            print(f"{part}: {found.get('error')}", file=sys.stderr, flush=True)
            continue
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_table(asked.results)
    page = asked.page.read_text(encoding="utf-8")
    asked.page.write_text(written(page, sections(results(asked.results))), encoding="utf-8")


if __name__ == "__main__":
    main()
